"""What the agent knows, made into router inputs; and what requests showed, made into what it knows next."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic, time
from typing import TYPE_CHECKING, Any, Final

from isthmus.edge.calibration import Calibrator, Observed
from isthmus.edge.constraints import RouterInputs, Way
from isthmus.edge.conversation import LastWays
from isthmus.edge.lengths import AnswerLengths
from isthmus.edge.policy import DeviceState, Policy
from isthmus.edge.remote import IDS_FORMAT
from isthmus.protocol.profiles import Prices
from isthmus.splitter.cost import CostModel
from isthmus.splitter.links import LinkView
from isthmus.splitter.situation import CloudState, EdgeState, Radio, Wire, Work, World

if TYPE_CHECKING:
    from isthmus.edge.clouds import Clouds
    from isthmus.edge.conversation import CloudMemory
    from isthmus.edge.decision_log import DecisionLog
    from isthmus.edge.link import CloudLink
    from isthmus.edge.requests import Decision, Finished, GenerateRequest, RowFormatName
    from isthmus.protocol.profiles import DeviceProfile
    from isthmus.splitter.pack import Pack

_log: Final = logging.getLogger(__name__)
KV_DTYPE_BYTES: Final = 4
_NO_DEVICE: Final = DeviceState()


@dataclass(frozen=True)
class RoutingOptions:
    """How an agent weighs and pays. `profile` None: nothing is predicted, the simple rule holds. `prices`
    None: those that the cloud tells. `budget_usd`: for all requests of the agent's life. `device_state` is
    asked for battery and mains at each decision."""

    profile: DeviceProfile | None = None
    policy: Policy = Policy()
    prices: Prices | None = None
    radio: Radio = Radio()
    budget_usd: float | None = None
    decision_log: DecisionLog | None = None
    device_state: Callable[[], DeviceState] = lambda: _NO_DEVICE


@dataclass(frozen=True)
class EdgeUse:
    """The edge at the moment of a decision. `memory_bytes`: what this request may take, None: anything.
    `cached`: rows of its prompt that are there already, by depth."""

    memory_bytes: int | None
    state: EdgeState
    cached: dict[int, int]


class Routing:
    """One per agent; lives on its event loop. `learning` False: what requests show is not taken in."""

    def __init__(
        self,
        pack: Pack,
        clouds: Clouds,
        memory: CloudMemory,
        options: RoutingOptions,
        *,
        min_depth: int,
        row_format: RowFormatName,
    ) -> None:
        self.options = options
        self.calibrator = Calibrator()
        self.lengths = AnswerLengths()
        self.learning = True
        self.spent_usd = 0.0
        self.energy_j: float | None = None
        """What requests have cost this device, as predicted for the tokens there were; None: not known."""
        self._pack = pack
        self._clouds = clouds
        self._memory = memory
        self._min_depth = min_depth
        self._row_format = row_format
        self._last_ways: LastWays[Way] = LastWays()
        self._reserved: dict[str, list[float]] = defaultdict(list)  # clients choose ids: two may be equal

    # ---- before ----------------------------------------------------------------------------------

    def inputs(
        self, request: GenerateRequest, use: EdgeUse, *, link: CloudLink | None = None
    ) -> RouterInputs:
        """As things stand now. `link`: look at this cloud alone."""
        spec, blocks = self._pack.spec, self._pack.bytes_per_block
        if link is None:
            by_name = request.route in ("split", "offload")
            state, detail, link = self._clouds.best_state(by_name=by_name)
        else:
            state, detail = link.state, link.detail
        welcome = None if link is None else link.welcome
        context = None
        if welcome is not None and state == "up":
            context = min(welcome.context_length, welcome.limits.max_tokens_per_session)
        options = self.options
        budget = options.budget_usd
        return RouterInputs(
            num_layers=spec.num_layers,
            layer_bytes=tuple(blocks[1:-1]),
            embed_bytes=blocks[0],
            head_bytes=blocks[-1],
            kv_bytes=spec.kv_bytes_per_token_layer(KV_DTYPE_BYTES),
            tokens=len(request.prompt_ids) + request.max_tokens,
            memory_bytes=use.memory_bytes,
            min_depth=self._min_depth,
            cloud_state=state,
            cloud_detail=detail,
            cloud_context=context,
            layers_here=self._pack.layers_here,
            head_here=self._pack.has("head"),
            route=request.route,
            split=request.split,
            shape=request.shape,
            privacy=request.privacy,
            grammar=request.grammar is not None,
            world=self._world(request, use, link),
            work=self._work(request, use, link),
            slo=request.slo,
            max_cost_usd=request.max_cost_usd,
            budget_left_usd=None if budget is None else self._left(budget, request),
            policy=options.policy,
            device=options.device_state(),
            residuals=self.calibrator.residuals(),
            pinned=self._last_ways.of(request.prompt_ids),
        )

    def _left(self, budget_usd: float, request: GenerateRequest) -> float:
        """What running requests may still come to cost is not there to be spent."""
        others = sum(sum(usd) for one, usd in self._reserved.items() if one != request.request_id)
        return budget_usd - self.spent_usd - others

    def _world(self, request: GenerateRequest, use: EdgeUse, link: CloudLink | None) -> World | None:
        profile = self.options.profile
        if profile is None:
            return None
        welcome = None if link is None else link.welcome
        view, cloud_state = LinkView(), CloudState(connected=False)
        if link is not None and welcome is not None:
            view = link.estimate(monotonic())
            load = link.load or welcome.load
            cloud_state = CloudState(
                connected=link.state == "up",
                tls=link.url.startswith("wss:"),
                sessions=float(load.running),
                queue_s=load.queue_s,
                canary=welcome.match == "canary" and not welcome.canary_passed,
                age_s=link.load_age_s or 0.0,
            )
        return World(
            edge=profile,
            cloud=None if welcome is None else welcome.profile,
            link=view,
            wire=Wire.of(self._pack.spec.hidden, request.row_format or self._row_format),
            kv_bytes=self._pack.spec.kv_bytes_per_token_layer(KV_DTYPE_BYTES),
            edge_state=use.state,
            cloud_state=cloud_state,
            prices=self.options.prices or (welcome.prices if welcome else None) or Prices(),
            radio=self.options.radio,
            factors=self.calibrator.factors(),
        )

    def _work(self, request: GenerateRequest, use: EdgeUse, link: CloudLink | None) -> Work | None:
        if self.options.profile is None:
            return None
        can_end = bool(request.end_ids or request.stop)
        prompt = request.prompt_ids
        forecast = self.lengths.forecast(len(prompt), request.max_tokens, can_end=can_end)
        formats = (IDS_FORMAT, request.row_format or self._row_format)
        held = {} if link is None else self._memory.shared(link.url, formats, prompt)
        return Work(len(prompt), forecast.mean, request.max_tokens, use.cached, held)

    # ---- after -----------------------------------------------------------------------------------

    def begin(self, request: GenerateRequest, inputs: RouterInputs, decision: Decision) -> None:
        """The request runs: what it may cost is set aside, and the decision is written down."""
        self._reserved[request.request_id].append(_most_usd(decision))
        if self.options.decision_log is not None:
            self.options.decision_log.append(request.request_id, inputs, decision, time())

    def end(
        self,
        request: GenerateRequest,
        inputs: RouterInputs,
        decision: Decision,
        finished: Finished | None,
        *,
        num_out: int,
    ) -> None:
        """The request is over after `num_out` tokens; `finished` None: it failed, or its client left. What
        was computed is paid for all the same."""
        reserved = self._reserved[request.request_id]
        reserved.remove(_most_usd(decision))
        if not reserved:
            del self._reserved[request.request_id]
        ended: Way = (decision.route, decision.split, decision.shape)
        if finished is not None:
            ended = (finished.route, finished.split, finished.shape)
        if self.learning and finished is not None:
            can_end = bool(request.end_ids or request.stop)
            if can_end:
                self.lengths.observe(
                    len(request.prompt_ids), num_out, finished=finished.finish_reason == "stop"
                )
            self._last_ways.remember((*request.prompt_ids, *finished.token_ids), ended)
        world, work = inputs.world, inputs.work
        if world is None or work is None or (ended[0] != "local" and world.cloud is None):
            return
        done = replace(work, output_tokens=float(max(1, num_out)))
        predicted = CostModel(world, done).predict(*ended)
        self.spent_usd += predicted.cost_usd
        if predicted.energy_j is not None:
            self.energy_j = (self.energy_j or 0.0) + predicted.energy_j
        if self.learning and finished is not None and finished.observed is not None:
            observed = self._completed(world, done, ended, finished.observed)
            self.calibrator.observe(world, done, ended, observed, link=self._link_now())

    def _link_now(self) -> LinkView | None:
        """The link as the request left it."""
        _, _, link = self._clouds.best_state(by_name=True)
        return None if link is None else link.estimate(monotonic())

    @staticmethod
    def _completed(world: World, work: Work, way: Way, observed: Observed) -> Observed:
        """In the U-shape the cloud does not tell how long it took: as long as predicted, the rest is the
        link's."""
        edge_s, decode_s = observed.edge_s, observed.decode_s
        if way[0] != "split" or observed.cloud_s is not None or edge_s is None or decode_s is None:
            return observed
        cloud_s = CostModel(world, work).predict(*way).decode_cloud_s
        left = max(0.0, decode_s - edge_s - cloud_s)
        return replace(observed, link_s=left)

    def stats(self) -> dict[str, Any]:
        """What was learned and spent."""
        factors = self.calibrator.factors()
        return {
            "profile": self.options.profile is not None,
            "spent_usd": self.spent_usd,
            "energy_j": self.energy_j,
            "observed_over_predicted": {name: getattr(factors, name) for name in factors.__slots__},
        }


def _most_usd(decision: Decision) -> float:
    """What the way taken may cost at most."""
    chosen = decision.chosen
    return (chosen.most_usd or 0.0) if chosen else 0.0
