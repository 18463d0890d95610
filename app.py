"""Start Twinframe: arguments -> engine -> page -> serve, until a signal says stop.

python app.py [--share] [--host H] [--port P] [--models a,b] [--preload a] [--offline] ...
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from contextlib import closing

from engine import catalog, options
from engine.errors import RequestError, TwinframeError
from engine.logs import quiet_libraries


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the environment's and our own defaults filled in."""
    parser = options.Parser(prog="app.py", description="Compare bf16 and quantized pictures in the browser.")
    parser.add_argument("--share", action="store_true", help="also open a public gradio.live link")
    parser.add_argument("--host", help="address to listen on (default: GRADIO_SERVER_NAME, or this machine only)")
    parser.add_argument("--port", type=int, help="port to listen on (default: GRADIO_SERVER_PORT or 7860)")
    parser.add_argument("--models", default="mini-flux", help="models to offer, comma-separated (default: %(default)s)")
    parser.add_argument("--preload", help="model to load at once, 'none' for none (default: the first offered)")
    options.add_source(parser)
    args = parser.parse_args(argv)
    args.models = tuple(dict.fromkeys(name.strip() for name in args.models.split(",") if name.strip()))
    if args.preload is None and args.models:
        args.preload = args.models[0]
    if args.port is None and os.environ.get("GRADIO_SERVER_PORT", "").isdecimal():
        args.port = int(os.environ["GRADIO_SERVER_PORT"])
    everywhere = "0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1"
    args.host = args.host or os.environ.get("GRADIO_SERVER_NAME") or everywhere
    return args


def check(args: argparse.Namespace) -> None:
    """What can be wrong with the arguments, before anything slow is started.

    Raises:
        RequestError: an argument cannot be used, in one sentence.
    """
    if not args.models:
        raise RequestError(f"--models names no model: choose from {', '.join(catalog.MODELS)}.")
    for name in args.models:
        catalog.model(name)
    if args.preload != "none" and args.preload not in args.models:
        raise RequestError(f"--preload {args.preload} is not among --models {','.join(args.models)}.")
    if args.port is None:
        return
    if not 1 <= args.port <= 65535:
        raise RequestError(f"Port {args.port} does not exist: choose one from 1 to 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        where, why = f"{args.host} port {args.port}", error.strerror or error
        raise RequestError(f"Cannot listen on {where}: {why}. Choose another with --port.") from error


def run(args: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM."""
    check(args)
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())

    # Imported late: a wrong argument is answered at once, and --offline is set before the hub's library looks.
    from engine.loading import Source
    from engine.worker import Worker
    from ui.page import build_page

    worker = Worker(args.models, source=Source.create(args.weights, args.random_weights, args.offline))
    with closing(worker), closing(build_page(worker, models=args.models)) as page:
        page.serve(host=args.host, port=args.port, share=args.share)
        if args.preload != "none":
            worker.preload(args.preload)
        stop.wait()


def main() -> None:
    quiet_libraries()
    try:
        run(arguments())
    except (TwinframeError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
