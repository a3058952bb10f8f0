"""`glmcompile serve`: an engine behind OpenAI's HTTP protocol."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from glmcompile.cli.arguments import BYTES, ENGINE, THREADS, VERIFY, verify_engine


@click.command("serve")
@ENGINE
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes a free one.",
)
@click.option(
    "--served-model-name",
    "model_names",
    multiple=True,
    help="Name that clients give as `model`; may be repeated. Default: the engine's folder.",
)
@click.option(
    "--api-key",
    envvar="GLMCOMPILE_API_KEY",
    help="Key that clients must send; also the variable GLMCOMPILE_API_KEY, which others cannot "
    "see in the list of processes.",
)
@click.option(
    "--max-model-len", type=int, help="Tokens of a prompt and its answer; default: the model's."
)
@click.option(
    "--kv-cache-memory",
    "kv_cache_bytes",
    type=BYTES,
    default="1GiB",
    show_default=True,
    help="Memory for keys and values.",
)
@click.option(
    "--max-concurrent",
    "max_sequences",
    type=int,
    default=16,
    show_default=True,
    help="Requests computed at once.",
)
@click.option(
    "--max-queue",
    type=int,
    default=256,
    show_default=True,
    help="Requests that may wait; more are answered with status 429.",
)
@click.option(
    "--limit-images",
    "max_images",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="Of one request.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    help="Bound on each image after resizing, where that is below the engine's own.",
)
@click.option(
    "--allowed-media-path",
    "media_path",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder whose images clients may name by file:// URLs; default: none.",
)
@click.option(
    "--allowed-media-host",
    "remote_hosts",
    multiple=True,
    help="Host, such as *.example.com, whose images are fetched by https; may be repeated.",
)
@click.option("--max-body", type=BYTES, default="64MiB", show_default=True, help="Of one request.")
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    help="Web origin whose pages may call the server; may be repeated.",
)
@click.option(
    "--grace",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds that running requests have after SIGTERM.",
)
@click.option("--access-log", metavar="FILE", help="A line of JSON for every request; - is stderr.")
@click.option(
    "--reasoning-parser",
    type=click.Choice(["auto"]),
    help="Give the thinking apart from the answer, by the markers that the model has.",
)
@click.option(
    "--replicas",
    type=click.IntRange(1),
    help="Run this many processes of the engine on Ray Serve, which share the threads; memory for "
    "keys and values is of each. Needs the extra `replicas`.",
)
@click.option("--fault", "faults", default="", hidden=True, help="See glmcompile.runtime.faults.")
@THREADS
@VERIFY
def command(
    engine: Path,
    host: str,
    port: int,
    model_names: tuple[str, ...],
    api_key: str | None,
    max_images: int,
    max_pixels: int | None,
    media_path: Path | None,
    remote_hosts: tuple[str, ...],
    max_body: int,
    cors_origins: tuple[str, ...],
    grace: float,
    access_log: str | None,
    reasoning_parser: str | None,
    replicas: int | None,
    verify: bool,
    **options: Any,
) -> None:
    """Serve ENGINE to OpenAI clients until SIGTERM or Ctrl-C, then finish what runs.

    \b
    glmcompile serve phone.engine --port 8000 --served-model-name autoglm-phone
    curl http://127.0.0.1:8000/v1/models
    """
    from glmcompile.runtime.media import SERVED
    from glmcompile.runtime.options import EngineOptions
    from glmcompile.serve.settings import ServerSettings

    settings = ServerSettings(
        model_names=model_names or (engine.resolve().name,),
        api_key=api_key,
        max_body=max_body,
        cors_origins=cors_origins,
        grace=grace,
        access_log=access_log,
        split_reasoning=reasoning_parser is not None,
        policy=replace(
            SERVED,
            max_images=max_images,
            max_pixels=max_pixels,
            media_path=media_path,
            remote_hosts=remote_hosts,
        ),
    )
    if api_key is None and not _is_loopback(host):
        click.echo(f"note: whoever reaches {host} can use the server; see --api-key.", err=True)
    if verify:
        verify_engine(engine)
    told = EngineOptions(verify=False, **options)

    def on_ready(url: str) -> None:
        click.echo(f"serving {settings.model_names[0]} at {url}")

    if replicas is None:
        from glmcompile.serve import server

        server.serve(engine, told, settings, host, port, on_ready)
    else:
        from glmcompile.serve import replicas as several

        several.serve(engine, told, settings, host, port, replicas, on_ready)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
