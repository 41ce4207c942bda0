"""Conversations as the agent keeps them, written through its API."""

from __future__ import annotations

from typing import Any

import httpx

from tests.processes import Service


def keep(service: Service, title: str, *messages: dict[str, Any]) -> str:
    """A new conversation of `messages` ({"role", "content"}); its id."""
    with httpx.Client(base_url=f"{service.http}/v1/isthmus") as client:
        conversation: dict[str, Any] = (
            client.post("/conversations", json={"title": title}).raise_for_status().json()
        )
        place = f"/conversations/{conversation['id']}/messages"
        client.put(place, json={"messages": list(messages)}).raise_for_status()
    return str(conversation["id"])
