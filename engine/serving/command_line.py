"""argparse as both command lines use it: a user's mistake is one sentence, like every other."""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from engine import catalog
from engine.environment import switch
from engine.errors import RequestError

PORT = 7860
"""Gradio's own."""


class Parser(argparse.ArgumentParser):
    """Raises its complaint, on one line, instead of printing usage and leaving.

    Raises:
        RequestError: from `parse_args`, when the arguments are wrong.
    """

    def error(self, message: str) -> NoReturn:
        said = " ".join(message.split())
        raise RequestError(f"{said[:1].upper()}{said[1:]}. See {self.prog} --help.")


def names(text: str) -> tuple[str, ...]:
    """Names with commas between, each once; "none" is none."""
    given = dict.fromkeys(name.strip() for name in text.split(",") if name.strip())
    return () if list(given) == ["none"] else tuple(given)


def devices(text: str) -> str | None:
    """Names of torch devices, with commas between those that are at work at once, or with + between those that work on
    one picture; None without any.

    Raises:
        ArgumentTypeError: a GPU is named twice, or both are asked for. A CPU may be named twice, to see how several
            devices behave where there are none.
    """
    if "," in text and "+" in text:
        raise argparse.ArgumentTypeError(
            f"{text} has both: put commas between devices that are at work at once, or + between those that work on "
            "one picture"
        )
    between = "+" if "+" in text else ","
    given = [name.strip() for name in text.split(between) if name.strip()]
    whole = ["cuda:0" if name == "cuda" else name for name in given]
    for name in whole:
        if whole.count(name) > 1 and not name.startswith("cpu"):
            raise argparse.ArgumentTypeError(f"{name} is named twice: name each GPU once")
    return between.join(given) or None


def apart(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of each device alone, where commas stand between several."""
    return [argparse.Namespace(**{**vars(args), "device": name}) for name in (args.device or "").split(",")]


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Where to run, and the arguments of `add_source` and of `with_loras`."""
    add_source(parser)
    parser.add_argument(
        "--lora",
        nargs="+",
        default=[],
        metavar="FILE_OR_REPO[:SCALE]",
        help="fuse these into the model before anything is quantized; nvfp4+no-lora is a column without them",
    )
    parser.add_argument(
        "--device",
        "--devices",
        type=devices,
        metavar="A[,B | +B]",
        default=os.environ.get("TWINFRAME_DEVICES", ""),
        help="torch device names of one kind: with commas between them each has a comparison of its own in the app and "
        "a column in compare, with + they work on one picture "
        "(default: TWINFRAME_DEVICES, else cuda where there is one, else cpu)",
    )


def named_folder(text: str) -> tuple[str, str]:
    """NAME=DIR of a quantized checkpoint, or NAME=OWNER/NAME[@REVISION] of one on the hub.

    Raises:
        ArgumentTypeError: it is not of that form.
    """
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR, as in mine=out/nvfp4")
    return name, folder


def model(text: str, offline: bool) -> str:
    """Id of a model of the catalog, or of a checkpoint of somebody's own, which the catalog has from now on.

    Raises:
        RequestError, LoadError: as `own.model`.
    """
    if text in catalog.MODELS:
        return text
    from engine.weights import own  # late, as below

    return own.model(text, offline)


def with_loras(args: argparse.Namespace, model: str) -> str:
    """The model's id, or that of the model with the LoRAs that were asked for.

    Raises:
        RequestError, LoadError: there is no such model, or one is no LoRA.
    """
    from engine.weights import lora  # late: it imports the hub's library, which looks at once whether it is offline

    return lora.given(args.lora, model, args.offline) if args.lora else model


def add_source(parser: argparse.ArgumentParser) -> None:
    """The arguments of `Source.create`: where weights come from."""
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="DIR",
        help="a checkpoint's folder, or one with a folder for each model, named by its id (default: TWINFRAME_WEIGHTS, "
        "else the hub for what is not bundled)",
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="random weights of the real architecture: right for speed and memory, not for what is made",
    )
    parser.add_argument("--offline", action="store_true", help="never fetch anything from the Hugging Face hub")


def is_own(name: str) -> bool:
    """Whether a model's name is that of a folder, of a repository on the hub, or of a kind without a pinned commit."""
    return name not in catalog.MODELS and (
        name in catalog.KINDS or "/" in name or os.sep in name or Path(name).is_dir()
    )


def check_app(args: argparse.Namespace) -> None:
    """What can be wrong with app.py's arguments, before anything slow is started.

    Raises:
        RequestError: an argument cannot be used, in one sentence.
    """
    if not args.models:
        raise RequestError(f"--models names no model: choose from {', '.join(catalog.MODELS)}.")
    for name in args.models:
        if not is_own(name):
            catalog.model(name)
    for name in args.preload:
        if name not in args.models:
            raise RequestError(f"--preload {name} is not among --models {','.join(args.models)}.")
    if args.lora and len(args.models) != 1:
        raise RequestError("--lora is for one model: name it alone with --models.")
    if args.mcp and importlib.util.find_spec("mcp") is None:
        raise RequestError('--mcp needs a package that is missing: run pip install "gradio[mcp]" and start again.')
    if args.mcp and os.environ.get("TWINFRAME_AUTH"):
        raise RequestError("--mcp cannot be had with TWINFRAME_AUTH, as MCP clients have no password: leave one out.")
    check_address(args.host, args.port)


def is_public(args: argparse.Namespace) -> bool:
    """Whether strangers can reach an app with these arguments."""
    return args.share or bool(os.environ.get("SPACE_ID")) or args.host not in ("127.0.0.1", "localhost", "::1")


def shares_results(args: argparse.Namespace, environment: Mapping[str, str]) -> bool:
    """TWINFRAME_SHARE_RESULTS: whether an identical request may get what was made for it before; by default where the
    app is public.

    Raises:
        RequestError: it is neither on nor off.
    """
    return switch(environment, "TWINFRAME_SHARE_RESULTS", default=is_public(args))


def check_address(host: str, port: int | None) -> None:
    """See whether a server could listen there; without a port, whether it could at all.

    Raises:
        RequestError: it could not.
    """
    if port is not None and not 1 <= port <= 65535:
        raise RequestError(f"Port {port} does not exist: choose one from 1 to 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        where, other = (host, "--host") if port is None else (f"{host} port {port}", "--port")
        why = error.strerror or error
        raise RequestError(f"Cannot listen on {where}: {why}. Choose another with {other}.") from error
