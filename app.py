"""Start Twinframe: arguments -> engine -> page -> serve, until a signal says stop.

python app.py [--share] [--host H] [--port P] [--models a,b] [--preload a,b] [--mcp] [--rehearse [LIST]] [--offline] ...
"""

from __future__ import annotations

import argparse
import gc
import os
import queue
import signal
from contextlib import closing
from functools import partial
from pathlib import Path

from engine import catalog, logs
from engine.environment import lends_cards, positive
from engine.errors import RequestError
from engine.leaving import leave
from engine.outputs import recordings
from engine.serving import command_line, rehearse
from engine.serving.admission import Door, Limits
from engine.serving.contracts import Device


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the environment's and our own defaults filled in."""
    parser = command_line.Parser(prog="app.py", description="Compare bf16 and quantized pictures in the browser.")
    parser.add_argument("--share", action="store_true", help="also open a public gradio.live link")
    parser.add_argument("--host", help="address to listen on (default: GRADIO_SERVER_NAME, or this machine only)")
    parser.add_argument("--port", type=int, help="port to listen on (default: GRADIO_SERVER_PORT or 7860)")
    several = partial(parser.add_argument, type=command_line.names, metavar="A,B")
    offered = os.environ.get("TWINFRAME_MODELS") or ",".join(catalog.BUNDLED)
    several("--models", default=offered, help="to offer (default: TWINFRAME_MODELS, else %(default)s)")
    several("--preload", help="models to load at once, or none (default: the first offered)")
    parser.add_argument(
        "--quantized",
        nargs="+",
        type=command_line.named_folder,
        default=[],
        metavar="NAME=DIR",
        help="quantized checkpoints to offer as columns, such as nvfp4@NAME; or NAME=OWNER/NAME[@REVISION] of the hub",
    )
    parser.add_argument("--mcp", action="store_true", help="offer the API to MCP clients too, at /gradio_api/mcp/")
    parser.add_argument(
        "--rehearse",
        nargs="?",
        const=recordings.LIST,
        type=Path,
        metavar="LIST",
        help="instead of serving, warm and run a list of requests once, and say whether to go on stage",
    )
    command_line.add_engine(parser)
    args = parser.parse_args(argv)
    args.preload = args.models[:1] if args.preload is None else args.preload
    if args.port is None and (named := os.environ.get("GRADIO_SERVER_PORT")):
        if not named.isdecimal():
            raise RequestError(f"GRADIO_SERVER_PORT is {named!r}: set it to a port's number, or unset it.")
        args.port = int(named)
    everywhere = "0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1"
    args.host = args.host or os.environ.get("GRADIO_SERVER_NAME") or everywhere
    return args


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT, which ends what runs at once, or SIGTERM, which gives it some time; or rehearse.
    Returns the exit status."""
    command_line.check_app(args)
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    preloaded = [args.models.index(name) for name in args.preload]
    args.models = tuple(command_line.model(name, args.offline) for name in args.models)
    args.preload = tuple(args.models[index] for index in preloaded)
    if args.lora:
        args.models = (command_line.with_loras(args, args.models[0]),)
        args.preload = args.models if args.preload else ()
    if args.rehearse:
        return rehearse.run(args)
    grace: dict[int, float] = {signal.SIGINT: 0.0, signal.SIGTERM: positive(os.environ, "TWINFRAME_GRACE", 20.0)}
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in grace:
        signal.signal(number, lambda number, _: signals.put(number))

    # Imported late: a wrong argument is answered at once, and --offline is set before the hub's library looks.
    devices: list[Device]
    if lends_cards(os.environ):
        from engine.serving.lent import Lent  # before torch and Gradio, which its package changes

        devices = [Lent.from_arguments(args)]
    else:
        from engine.serving.process import Process

        each = command_line.apart(args)
        devices = [Process.from_arguments(one) for one in each]
        if len(devices) > 1:
            from engine.serving.process import require_one_kind

            require_one_kind([one.device for one in each], devices)
    from engine.serving.worker import Worker
    from ui.page import build_page
    from ui.web.middleware import Doors  # while the device's process imports torch

    doors, door = Doors.from_environment(os.environ), Door(Limits.from_environment(os.environ))
    shares = command_line.shares_results(args, os.environ)
    with (
        closing(Worker(args.models, devices[0], door, shares, devices[1:])) as worker,
        closing(build_page(worker, models=args.models)) as page,
    ):
        try:
            page.serve(host=args.host, port=args.port, share=args.share, doors=doors, mcp=args.mcp)
        except OSError as error:  # every port that Gradio tries is taken, or the one that was free a moment ago
            where = args.host if args.port is None else f"{args.host} port {args.port}"
            raise RequestError(f"Cannot listen on {where}: the port is taken. Choose another with --port.") from error
        gc.freeze()  # what is here stays: looking through it for garbage would stop all answers for 0.4 s at a time
        for name in args.preload:
            worker.preload(name)
        worker.close(grace=grace[signals.get()])
        page.drain()
    return 0


def main() -> None:
    leave(lambda: run(arguments()), logs.structured)


if __name__ == "__main__":
    main()
