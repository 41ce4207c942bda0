"""The paired world with connections that are lost again and again: at any message, noticed by either end at
any time, while RESUME is under way too, and with what the old connection still had to say.
"""

from __future__ import annotations

from collections import deque
from random import Random

from isthmus.protocol.states import CloudState, EdgeState
from tests.protocol.conversation import Conversation
from tests.protocol.paired_link import Link
from tests.protocol.paired_world import Action, World


class LossyWorld(World):
    def actions(self) -> list[Action]:
        found = super().actions() * 2
        if not self.link.is_cut:
            found += [self.cut]
        elif not self.link.pair.edge.is_closed:
            found += [self.edge_notices] * 2
        if self.link.pair.edge.is_closed:
            found += [self.reconnect] * 4
        elif self.resumable():
            found += [self.resume] * 4
        if self.unnoticed():
            found += [self.cloud_notices]
        if any(link.resumes for link in self.links):
            found += [self.answer] * 4
        if self.replaying():
            found += [self.replay] * 3
        if self.detached() and self.counter % 11 == 10:
            found += [self.expire]
        return found

    def cut(self, rng: Random) -> None:
        self.link.cut(keep_up=rng.random() < 0.5)

    def tick(self, rng: Random) -> None:
        if not self.link.is_cut:
            super().tick(rng)

    # ---- who notices when

    def edge_notices(self, rng: Random) -> None:
        del rng
        for event in self.link.pair.edge.lost():
            self.on_edge(self.link, event)

    def cloud_notices(self, rng: Random) -> None:
        self.end_on_the_cloud(rng.choice(self.unnoticed()))

    def unnoticed(self) -> list[Link]:
        return [link for link in self.links if link.is_cut and not link.pair.cloud.is_closed]

    def end_on_the_cloud(self, link: Link) -> None:
        link.ways["up"].clear()
        for event in link.pair.cloud.lost():
            self.on_cloud(link, event)

    # ---- resume

    def reconnect(self, rng: Random) -> None:
        del rng
        self.links.append(Link(self.usage))

    def resume(self, rng: Random) -> None:
        self.send_resume(rng.choice(self.resumable()))

    def resumable(self) -> list[Conversation]:
        return [talk for talk in self.talks.values() if talk.core.state is EdgeState.SUSPENDED]

    def send_resume(self, talk: Conversation) -> None:
        self.link.pair.edge.resume(talk.core)
        self.link.talks[talk.core.stream] = talk
        self.collect()

    def answer(self, rng: Random) -> None:
        self.answer_resume(rng.choice([link for link in self.links if link.resumes]))

    def replay(self, rng: Random) -> None:
        self.send_again(rng.choice(self.replaying()), rng.randint(1, 4))

    def replaying(self) -> list[Conversation]:
        return [
            talk
            for talk in self.talks.values()
            if talk.replay is not None and talk.core.state is EdgeState.DECODE
        ]

    def expire(self, rng: Random) -> None:
        """It waited too long for its edge."""
        self.evict(rng.choice(self.detached()))

    def detached(self) -> list[Conversation]:
        return [
            talk
            for talk in self.talks.values()
            if talk.session is not None and talk.session.state is CloudState.DETACHED
        ]

    def settle(self) -> None:
        """Until nothing moves: every loss is noticed, every session resumed, every replay done."""
        if self.link.is_cut:
            if not self.link.pair.edge.is_closed:
                self.edge_notices(Random())
            self.reconnect(Random())
        for link in self.unnoticed():
            self.end_on_the_cloud(link)
        for talk in self.resumable():
            self.send_resume(talk)
        moved = True
        while moved:
            super().settle()
            moved = False
            for link in self.links:
                while link.resumes:
                    self.answer_resume(link)
                    moved = True
            for talk in self.replaying():
                moved = self.send_again(talk, 4) or moved
            self.collect()
        assert not self.replaying()


class HostileWorld(LossyWorld):
    """On top of that, any message may come again and any two may change places, within a connection."""

    network_lies = True

    def part(self) -> None:
        """An ERROR that overtook its OPEN leaves a session on the cloud alone, until the connection ends."""
        self.link.cut(keep_up=False)
        self.edge_notices(Random())
        self.end_on_the_cloud(self.link)

    def actions(self) -> list[Action]:
        found = super().actions()
        found += [self.repeat] if self.waiting(1) else []
        found += [self.swap] if self.waiting(2) else []
        return found

    def waiting(self, at_least: int) -> list[deque[bytes]]:
        ways = self.link.ways.values()
        return [queue for streams in ways for queue in streams.values() if len(queue) >= at_least]

    def repeat(self, rng: Random) -> None:
        queue = rng.choice(self.waiting(1))
        queue.append(rng.choice(queue))

    def swap(self, rng: Random) -> None:
        queue = rng.choice(self.waiting(2))
        one, two = rng.sample(range(len(queue)), 2)
        queue[one], queue[two] = queue[two], queue[one]
