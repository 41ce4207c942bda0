"""Time, energy and money of every way to serve a request. Pure: profiles, link and request in, figures out.

    local     load + prefill + (n - 1) * step
    offload   handshake + RTT + ids / up + queue + prefill + (n - 1) * step
    split K   handshake + RTT + pipelined prefill + (n - 1) * (edge step + row / up + RTT + token / down
              + cloud step)

with n output tokens. A split's prompt goes in m chunks through three stages, edge, uplink, cloud: the first
passes all of them, then the slowest one sets the pace, (m - 1) times. Steps take as long as the context in
the middle of the answer makes them. What the caches on each side hold is not computed; rows that the cloud
lacks are computed on the edge even if that has them. In the U-shape the edge also runs norm and head.

Terms add up to the total: where stages overlap, the time is the slowest stage's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from isthmus.splitter.links import Estimate
from isthmus.splitter.sides import Side, finite, side_of
from isthmus.splitter.situation import Route, Shape, Work, World

# Round trips before the first frame: TCP, the websocket's upgrade, HELLO; TLS 1.3 takes one more.
HANDSHAKE_ROUNDS: Final = 3
TLS_ROUNDS: Final = 1
FRAME_BYTES: Final = 48  # our header and the websocket's
OPEN_BYTES: Final = 700
TOKEN_BYTES: Final = 150
"""A RESULT or STREAM of one token, as it travels."""
ID_BYTES: Final = 4
# Where nothing was measured yet. Slow rather than fast: a wrong guess should cost a measurement, no request.
ASSUMED_RTT_S: Final = 0.1
ASSUMED_BYTES_PER_S: Final = 1e6
TERMS: Final = ("load_s", "handshake_s", "queue_s", "prefill_edge_s", "prefill_link_s", "prefill_cloud_s",
                "decode_edge_s", "decode_link_s", "decode_cloud_s")  # fmt: skip
"""The parts of `Prediction.total_s`, all in seconds."""


class Prediction(NamedTuple):
    """One way's figures. `energy_j` (of the edge) is None where its power is unknown. `bottleneck_s`: seconds
    per token of the busiest of edge, link and cloud: what a token costs when many requests overlap.
    `most_usd`: the cost if the answer took all of `max_tokens`, which a budget has to cover."""

    route: Route
    split: int
    shape: Shape | None
    load_s: float
    handshake_s: float
    queue_s: float
    prefill_edge_s: float
    prefill_link_s: float
    prefill_cloud_s: float
    decode_edge_s: float
    decode_link_s: float
    decode_cloud_s: float
    ttft_s: float
    total_s: float
    tokens_per_s: float
    bottleneck_s: float
    bytes_up: float
    bytes_down: float
    energy_j: float | None
    cost_usd: float
    most_usd: float
    memory_bytes: int

    def terms(self) -> dict[str, float]:
        """The parts of `total_s`."""
        return {name: getattr(self, name) for name in TERMS}


def usable(estimate: Estimate | None, assumed: float) -> float:
    """The value to reckon with; `assumed` where there is none."""
    value = None if estimate is None else estimate.value
    if value is None or not value > 0:  # also NaN
        return assumed
    return value


class _Used(NamedTuple):
    """What a way takes of others: prompt rows that the cloud computes, its share of the layers, its seconds
    of computing and the bytes that travel, each for the prompt and per token."""

    rows: float
    share: float
    busy_s: float
    step_busy_s: float
    up_bytes: float
    step_up_bytes: float
    down_bytes: float
    step_down_bytes: float


_NOTHING: Final = _Used(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class _Common(NamedTuple):
    """What splits at any K have in common that find the same rows cached: seconds of a chunk and of a step
    apart from the layers' time, and for each layer. `rounds`: chunks, the last one counted by its rows."""

    sent: int
    rounds: float
    edge_chunk_s: float
    edge_chunk_layer_s: float
    up_chunk_s: float
    cloud_chunk_s: float
    cloud_chunk_layer_s: float
    link_s: float
    edge_step_s: float
    cloud_step_s: float
    link_step_s: float
    transfer_s: float
    edge_head_s: float
    cloud_head_s: float
    up_bytes: float
    step_up_bytes: float
    down_bytes: float
    step_down_bytes: float


class CostModel:
    """Predictions for one request in one world. Made per decision: what candidates share is computed once."""

    def __init__(self, world: World, work: Work) -> None:
        self.world, self.work = world, work
        self.edge = side_of(world.edge)
        self.cloud = None if world.cloud is None else side_of(world.cloud)
        self.num_layers = self.edge.num_layers
        link = world.link
        rtt = None if link.rtt is None else finite(link.rtt.value)
        self.rtt_s = ASSUMED_RTT_S if rtt is None or rtt < 0 else rtt
        self.up = usable(link.up, ASSUMED_BYTES_PER_S)
        self.down = usable(link.down, ASSUMED_BYTES_PER_S)
        self.steps = max(0.0, work.output_tokens - 1.0)
        self._most_steps = max(0, work.max_tokens - 1)
        middle = work.prompt_tokens + self.steps / 2
        self._crowd = 1 + world.edge_state.running
        profile = world.edge
        self._edge_layer_s = self.edge.layer_s(middle) * self._crowd
        self._edge_step_s = (profile.step_s + profile.embed_row_s) * self._crowd
        self._edge_head_s = profile.head_s * self._crowd
        if self.cloud is not None:
            sessions = 1.0 + max(0.0, finite(world.cloud_state.sessions) or 0.0)
            self._sessions = sessions
            self._batch = self.cloud.crowding(sessions)
            self._cloud_layer_s = self.cloud.layer_s(middle)
            self._queue_s = max(0.0, finite(world.cloud_state.queue_s) or 0.0)
        self._handshake_s = 0.0
        if not world.cloud_state.connected:
            rounds = HANDSHAKE_ROUNDS + (TLS_ROUNDS if world.cloud_state.tls else 0)
            self._handshake_s = rounds * self.rtt_s
        # Attributes of attributes, asked for by every candidate.
        tokens = work.prompt_tokens + work.max_tokens
        one_layer = self.edge.weight_bytes(1, head=False)
        self._fixed_bytes = one_layer - profile.layer_bytes
        self._layer_bytes = profile.layer_bytes + world.kv_bytes * tokens
        self._head_bytes = self.edge.weight_bytes(1, head=True) - one_layer
        loaded, self._head_loaded = world.edge_state.loaded_layers, world.edge_state.head_loaded
        self._loaded = self.num_layers if loaded is None else loaded
        self._all_loaded = loaded is None
        self._layer_load_s = profile.load_s
        self._radio_j = (world.radio.awake_w, world.radio.up_j, world.radio.down_j)
        prices = world.prices
        self._usd_per_token_in = prices.input_usd_per_mtok / 1e6
        self._usd_per_token_out = prices.output_usd_per_mtok / 1e6
        self._usd_per_busy_s = prices.gpu_usd_per_h / prices.utilisation / 3600
        self._usd_per_byte_up = world.radio.usd_per_byte
        self._usd_per_byte_down = world.radio.usd_per_byte + prices.egress_usd_per_gb / 1e9
        self._active_w, self._idle_w = finite(world.edge.active_w), finite(world.edge.idle_w) or 0.0
        self._commons: dict[tuple[int, int, Shape | None], _Common] = {}

    def ways(self, shape: Shape) -> Iterator[tuple[Route, int, Shape | None]]:
        """Every candidate: local, offload, a split at each K."""
        yield "local", self.num_layers, None
        yield "offload", 0, None
        for split in range(1, self.num_layers):
            yield "split", split, shape

    def memory_bytes(self, split: int, shape: Shape | None) -> int:
        """What the candidate adds to an idle agent: weights in all their copies, buffers, and the KV of the
        prompt and the longest answer."""
        if split == 0:
            return 0
        head = 0 if shape == "prefix" else self._head_bytes
        return self._fixed_bytes + split * self._layer_bytes + head

    def predict(self, route: Route, split: int, shape: Shape | None) -> Prediction:
        """The figures of one candidate. `route` other than local needs a cloud profile (ValueError)."""
        if route == "local":
            return self._local(split)
        if self.cloud is None:
            raise ValueError("no cloud profile, nothing to predict")
        return self._offload() if route == "offload" else self._split(split, shape)

    # ---- the three routes ------------------------------------------------------------------------

    def _local(self, split: int) -> Prediction:
        work, factors = self.work, self.world.factors
        rows = max(1, work.prompt_tokens - work.edge_cached.get(split, 0))
        prefill = self._rows_s(self.edge, self.edge.layers(0, split), rows, work.prompt_tokens)
        prefill = (prefill * self._crowd + self._edge_head_s) * factors.local_prefill
        step = self._edge_step_s + self._edge_head_s + self.edge.layers(0, split) * self._edge_layer_s
        step *= factors.local_decode
        load = self._load_s(split, head=True)
        return self._made(
            "local", split, None, load, 0.0, (prefill, 0.0, 0.0), (step, 0.0, 0.0), prefill, step, _NOTHING
        )

    def _offload(self) -> Prediction:
        work, factors, cloud = self.work, self.world.factors, self.cloud
        assert cloud is not None
        cached = work.cloud_cached.get(0, 0)
        rows = max(1, work.prompt_tokens - cached)
        bytes_up = OPEN_BYTES + FRAME_BYTES + ID_BYTES * rows
        link = self.rtt_s + bytes_up / self.up + TOKEN_BYTES / self.down
        if cached:  # the ids wait for the answer to the offer
            link += self.rtt_s
        layers = cloud.layers(0, self.num_layers)
        profile = cloud.profile
        compute = self._rows_s(cloud, layers, rows, work.prompt_tokens) + profile.head_s
        step = profile.step_s + profile.embed_row_s + profile.head_s + layers * self._cloud_layer_s
        factor = factors.offload_prefill
        paced = max(step * self._batch, TOKEN_BYTES / self.down)
        used = _Used(rows, 1.0, compute, step, bytes_up, 0.0, OPEN_BYTES + TOKEN_BYTES, TOKEN_BYTES)
        return self._made(
            "offload", 0, None, 0.0, self._queue_s * factor,
            (0.0, link * factor, compute * self._batch * factor),
            (0.0, 0.0, paced * factors.offload_decode),
            0.0, max(step * self._batch / self._sessions, TOKEN_BYTES / self.down), used,
        )  # fmt: skip

    def _split(self, split: int, shape: Shape | None) -> Prediction:
        work, cloud = self.work, self.cloud
        assert cloud is not None
        have, kept = work.edge_cached.get(split, 0), work.cloud_cached.get(split, 0)
        common = self._commons.get((have, kept, shape))
        if common is None:
            common = self._commons[have, kept, shape] = self._common(cloud, have, kept, shape)
        factors, batch, rounds = self.world.factors, self._batch, common.rounds
        edge_layers, cloud_below = self.edge.share_below[split], cloud.share_below
        cloud_layers = cloud_below[-1] - cloud_below[split]
        edge_chunk = common.edge_chunk_s + edge_layers * common.edge_chunk_layer_s
        cloud_alone = common.cloud_chunk_s + cloud_layers * common.cloud_chunk_layer_s
        cloud_chunk = cloud_alone * batch
        edge_s, link_s, cloud_s = edge_chunk, common.up_chunk_s, cloud_chunk
        if edge_s >= link_s and edge_s >= cloud_s:
            edge_s *= rounds
        elif link_s >= cloud_s:
            link_s *= rounds
        else:
            cloud_s *= rounds
        link_s += common.link_s
        if kept or have:  # an offer is answered while the first chunk is computed
            link_s += max(0.0, self.rtt_s - edge_chunk)
        unsent = max(0, kept - have)  # the edge catches up with the cloud, sending nothing
        caught_up = self._rows_s(self.edge, edge_layers, unsent, kept) * self._crowd if unsent else 0.0
        edge_s += caught_up + common.edge_head_s
        cloud_s += common.cloud_head_s * batch
        cloud_step = common.cloud_step_s + cloud_layers * self._cloud_layer_s
        decode = (
            (common.edge_step_s + edge_layers * self._edge_layer_s) * factors.split_edge,
            common.link_step_s * factors.split_link,
            cloud_step * batch * factors.split_cloud,
        )
        f = factors.split_prefill
        share = cloud_layers / self.num_layers
        busy = cloud_alone * rounds + common.cloud_head_s
        used = _Used(
            common.sent, share, busy, cloud_step,
            common.up_bytes, common.step_up_bytes, common.down_bytes, common.step_down_bytes,
        )  # fmt: skip
        return self._made(
            "split", split, shape, self._load_s(split, head=shape == "u"), self._queue_s * f,
            (edge_s * f, link_s * f, cloud_s * f), decode,
            (edge_chunk * rounds + caught_up + common.edge_head_s) * f,
            max(decode[0], decode[2] / self._sessions, common.transfer_s), used,
        )  # fmt: skip

    def _common(self, cloud: Side, have: int, kept: int, shape: Shape | None) -> _Common:
        """`have`, `kept`: rows of the prompt that the edge and the cloud hold already."""
        world, prompt, wire, u_shape = self.world, self.work.prompt_tokens, self.world.wire, shape == "u"
        edge, far, crowd = world.edge, cloud.profile, self._crowd
        sent = max(1, prompt - kept)
        rows = min(sent, wire.chunk_rows)
        middle = prompt - sent / 2
        down_bytes = FRAME_BYTES + wire.hidden_row_bytes if u_shape else float(TOKEN_BYTES)
        row_bytes = FRAME_BYTES + wire.step_row_bytes
        rtts = 2.0 if world.cloud_state.canary else 1.0
        edge_head, cloud_head = (self._edge_head_s, 0.0) if u_shape else (0.0, far.head_s)
        return _Common(
            sent=sent,
            rounds=sent / rows,
            edge_chunk_s=(edge.step_s + (edge.embed_row_s + edge.codec_row_s) * rows) * crowd,
            edge_chunk_layer_s=self._chunk_layer_s(self.edge, rows, middle) * crowd,
            up_chunk_s=(rows * wire.row_bytes + FRAME_BYTES) / self.up,
            cloud_chunk_s=far.step_s + far.codec_row_s * rows,
            cloud_chunk_layer_s=self._chunk_layer_s(cloud, rows, middle),
            link_s=rtts * self.rtt_s + OPEN_BYTES / self.up + down_bytes / self.down,
            edge_step_s=self._edge_step_s + edge.codec_row_s * crowd + edge_head,
            cloud_step_s=far.step_s + far.codec_row_s + cloud_head,
            link_step_s=self.rtt_s + row_bytes / self.up + down_bytes / self.down,
            transfer_s=max(row_bytes / self.up, down_bytes / self.down),
            edge_head_s=edge_head,
            cloud_head_s=cloud_head,
            up_bytes=OPEN_BYTES + sent * wire.row_bytes,
            step_up_bytes=row_bytes,
            down_bytes=OPEN_BYTES + down_bytes,
            step_down_bytes=down_bytes,
        )

    # ---- parts -----------------------------------------------------------------------------------

    def _rows_s(self, side: Side, layers: float, rows: int, upto: int) -> float:
        """Rows up to position `upto` in chunks, one after the other."""
        size = min(rows, self.world.wire.chunk_rows)
        chunk = self._chunk_s(side, layers, size, upto - rows / 2)
        return (chunk + side.profile.embed_row_s * size) * rows / size

    def _chunk_s(self, side: Side, layers: float, rows: int, middle: float) -> float:
        return side.profile.step_s + layers * self._chunk_layer_s(side, rows, middle)

    @staticmethod
    def _chunk_layer_s(side: Side, rows: int, middle: float) -> float:
        """A mean layer over a chunk of a prompt. `middle`: the mean position, so half a chunk less stands
        before it."""
        return side.chunk_layer_s(rows, max(0, int(middle - rows / 2)))

    def _load_s(self, split: int, *, head: bool) -> float:
        if self._all_loaded:
            return 0.0
        missing = split - self._loaded if split > self._loaded else 0
        if head and not self._head_loaded:
            missing += 1
        return missing * self._layer_load_s

    def _made(
        self,
        route: Route,
        split: int,
        shape: Shape | None,
        load: float,
        queue: float,
        prefill: tuple[float, float, float],
        decode: tuple[float, float, float],
        edge_busy: float,
        bottleneck: float,
        used: _Used,
    ) -> Prediction:
        """`prefill`, and `decode` per token: on edge, link, cloud. `edge_busy`: the edge's own computing of
        the prompt, of which stages that overlap show a part only."""
        steps = self.steps
        handshake = 0.0 if route == "local" else self._handshake_s
        edge_s, link_s, cloud_s = prefill
        step_edge_s, step_link_s, step_cloud_s = decode
        ttft = load + handshake + queue + edge_s + link_s + cloud_s
        step = step_edge_s + step_link_s + step_cloud_s
        total = ttft + steps * step
        up, down = used.up_bytes + steps * used.step_up_bytes, used.down_bytes + steps * used.step_down_bytes
        busy, awake = load + edge_busy + steps * step_edge_s, 0.0 if route == "local" else total
        cost, per_token = self._cost(used) if used.share else (0.0, 0.0)
        return Prediction(
            route, split, shape, load, handshake, queue, edge_s, link_s, cloud_s,
            steps * step_edge_s, steps * step_link_s, steps * step_cloud_s,
            ttft, total, 1.0 / step if step > 0 else 0.0, bottleneck, up, down,
            self._energy(busy, total, awake, up, down),
            cost + steps * per_token, cost + self._most_steps * per_token,
            self.memory_bytes(split, shape),
        )  # fmt: skip

    def _energy(self, busy: float, total: float, awake: float, up: float, down: float) -> float | None:
        """The edge's: active while it computes, idle while it waits; its radio's, which is awake for `awake`
        seconds, and its bytes'."""
        if self._active_w is None:
            return None
        awake_w, up_j, down_j = self._radio_j
        waiting = total - busy if total > busy else 0.0
        return self._active_w * busy + self._idle_w * waiting + awake_w * awake + up_j * up + down_j * down

    def _cost(self, used: _Used) -> tuple[float, float]:
        """Dollars up to the first token, and for each one after it."""
        out, busy = used.share * self._usd_per_token_out, self._usd_per_busy_s
        up, down = self._usd_per_byte_up, self._usd_per_byte_down
        first = used.share * used.rows * self._usd_per_token_in + out + used.busy_s * busy
        later = out + used.step_busy_s * busy
        return (
            first + used.up_bytes * up + used.down_bytes * down,
            later + used.step_up_bytes * up + used.step_down_bytes * down,
        )
