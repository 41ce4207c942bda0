"""Options that several commands share: which model and way, which clouds, and what to do when one is lost."""

from __future__ import annotations

from typing import Annotated

import typer

BitsOption = Annotated[
    str | None, typer.Option("--bits", help="Weights of the pack: auto, 4, 8 or 32.", metavar="BITS")
]
RouteOption = Annotated[
    str | None, typer.Option("--route", help="auto, local, split or offload.", metavar="ROUTE")
]
SplitOption = Annotated[
    int | None, typer.Option("--split", help="Number of layers on the edge.", metavar="K")
]
ShapeOption = Annotated[
    str | None,
    typer.Option(
        "--shape", help="Who samples in a split: the cloud (prefix) or the edge (u).", metavar="SHAPE"
    ),
]
CodecOption = Annotated[
    str | None,
    typer.Option("--codec", help="Boundary rows on the wire: f32, bf16 or int8o.", metavar="CODEC"),
]
MaxTokensOption = Annotated[
    int | None, typer.Option("--max-tokens", help="Most tokens to generate.", min=1, metavar="N")
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        help="0 = greedy. Default: the model's own advice, greedy where it has none.",
        min=0,
        metavar="T",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", help="Seed of the sampler; drawn at random by default.", min=0, metavar="S"),
]

CloudOption = Annotated[
    list[str] | None, typer.Option("--cloud", help="ws:// or wss:// URL; may be repeated.", metavar="URL")
]
KeyFileOption = Annotated[
    str | None, typer.Option("--api-key-file", help="File with the key for the cloud.", metavar="FILE")
]
TlsCaOption = Annotated[
    str | None,
    typer.Option("--tls-ca", help="Only certificates to trust for clouds, PEM: own CA.", metavar="FILE"),
]
TlsClientCertOption = Annotated[
    str | None, typer.Option("--tls-client-cert", help="Certificate shown to clouds, PEM.", metavar="FILE")
]
TlsClientKeyOption = Annotated[
    str | None, typer.Option("--tls-client-key", help="Key of that certificate, PEM.", metavar="FILE")
]
FallbackOption = Annotated[
    str | None,
    typer.Option(
        "--fallback",
        help="Where a request may go on whose cloud is lost: any (another cloud or here), cloud, none.",
        metavar="WHERE",
    ),
]
ReconnectOption = Annotated[
    float | None,
    typer.Option("--reconnect-s", help="Seconds to try to reach a lost cloud again.", min=0, metavar="S"),
]
HistoryOption = Annotated[
    int | None,
    typer.Option("--history-mb", help="Memory for sent rows, kept for a lost cloud.", min=0, metavar="MB"),
]
