"""Start Twinframe: arguments -> engine -> page -> serve, until a signal says stop.

python app.py [--share] [--host H] [--port P] [--models a,b] [--preload a] [--offline] ...
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import sys
from contextlib import closing

from engine import catalog, options
from engine.door import Door, Limits, positive
from engine.errors import RequestError, TwinframeError
from engine.logs import quiet_libraries, structured


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
    if args.port is not None:
        options.check_address(args.host, args.port)


def run(args: argparse.Namespace) -> None:
    """Serve until SIGINT, which ends what runs at once, or SIGTERM, which gives it some time."""
    check(args)
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    grace = {signal.SIGINT: 0.0, signal.SIGTERM: positive(os.environ, "TWINFRAME_GRACE", 20.0)}
    signals = queue.SimpleQueue()
    for number in grace:
        signal.signal(number, lambda number, _: signals.put(number))

    # Imported late: a wrong argument is answered at once, and --offline is set before the hub's library looks.
    from engine.loading import Source
    from engine.worker import Worker
    from ui.doors import Doors
    from ui.page import build_page

    doors, door = Doors.from_environment(os.environ), Door(Limits.from_environment(os.environ))
    source = Source.create(args.weights, args.random_weights, args.offline)
    with (
        closing(Worker(args.models, source=source, door=door)) as worker,
        closing(build_page(worker, models=args.models)) as page,
    ):
        page.serve(host=args.host, port=args.port, share=args.share, doors=doors)
        if args.preload != "none":
            worker.preload(args.preload)
        worker.close(grace=grace[signals.get()])
        page.drain()


def main() -> None:
    quiet_libraries()
    structured()
    try:
        run(arguments())
    except (TwinframeError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
