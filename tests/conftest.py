"""Shared by tests: one worker with the real miniature on the CPU, a cache folder of its own, and a browser."""

import gc
import os
import shutil
import time
from dataclasses import replace

import pytest
from hypothesis import settings

from engine.catalog import MINI_FLUX
from engine.logs import quiet_libraries
from tests.support import own_catalog
from tests.support.fake_engine import VISITS, leave

quiet_libraries()  # before anything imports torch and diffusers
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores, and threads that wait for each other spin
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor compiles and runs a program for each instruction set of the CPU, in every process with a cache of its own.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
settings.register_profile("quiet", deadline=None, database=None)  # no clock, and no folder left in the checkout
settings.load_profile("quiet")


APP_LOGGERS = ("engine", "ui", "gradio", "uvicorn")
LONGEST = (
    "test_cli.py",
    "test_bench.py",
    "test_proof.py",
    "test_checkpoint.py",
    "test_program.py",
    "test_lora.py",
    "test_own.py",
    "test_everyone.py",
    "test_blackwell_recipes.py",
    "test_faults.py",
    "test_streaming.py",
    "test_studio.py",
    "test_shutdown.py",
    "test_worker.py",
    "test_load.py",
    "test_address.py",
    "test_blackwell_kernels.py",
    "test_blackwell_step.py",
    "test_evaluate.py",
    "test_quantized.py",
    "test_stage.py",
    "test_handlers.py",
    "test_failures.py",
    "test_blackwell_compile.py",
)
"""Files that take a minute of a core or about that, the longest first."""


def pytest_collection_modifyitems(items):
    """The longest files come first: one that begins late would run on alone, while the other core has nothing left."""
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish(session):
    """What the tests import stays: it is not looked through for garbage, which takes a second each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    """With TWINFRAME_TEST_ALL=1, as in CI, nothing may be skipped but what needs a GPU."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [str(report.longrepr[2]) for report in reporter.stats.get("skipped", [])] if reporter else []
    if os.environ.get("TWINFRAME_TEST_ALL") == "1" and any("CUDA" not in reason for reason in skipped):
        reporter.write_line("\nTWINFRAME_TEST_ALL: only what needs a CUDA device may be skipped.", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def playwright():
    """While it is there, asyncio has a loop in this thread: a test that runs a loop of its own does so in another."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        yield playwright


def _launched(launch, *args):
    """A browser, by what of Playwright's launches one."""
    from playwright.sync_api import Error

    try:
        return launch(*args, executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    except Error as error:
        pytest.skip(f"Chromium does not start: {error}")


@pytest.fixture(scope="session")
def chromium(playwright):
    """A browser for all files, whose contexts begin with nothing: each compiles the page's scripts anew."""
    browser = _launched(playwright.chromium.launch)
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def profile(playwright, tmp_path_factory):
    """A context for all files that keeps what it has compiled of the page's scripts, a third of what a visit costs."""
    context = _launched(playwright.chromium.launch_persistent_context, tmp_path_factory.mktemp("profile"))
    yield context
    context.close()


@pytest.fixture
def visit(profile, request):
    """Opens an address in a page that remembers nothing; the test fails if the page logged an error. One with `options`
    is in a context of its own, which has them."""
    contexts, origins, errors = [], set(), []

    def opened(width, height, options):
        if options:
            chromium = request.getfixturevalue("chromium")
            contexts.append(chromium.new_context(viewport={"width": width, "height": height}, **options))
            return contexts[-1].new_page()
        page = profile.new_page()
        page.set_viewport_size({"width": width, "height": height})
        return page

    def note(message):
        if message.type == "error":
            errors.append(f"{message.text} {message.location['url']}")

    def open_page(url, width=1440, height=900, wait=True, **options):
        page = opened(width, height, options)
        VISITS.append(page)
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", note)
        origins.add("/".join(url.split("/")[:3]))
        page.goto(url)
        if not wait:
            return page
        # Gradio mounts components one after another.
        for part in ("#tf-go", "#tf-precisions label", "#tf-seed input", ".tf-verdict", "#tf-views input"):
            page.wait_for_selector(part, state="attached")
        page.wait_for_selector("twinframe-cover", state="detached")
        return page

    yield open_page
    while VISITS:
        leave(VISITS[-1])
    first, *pages = profile.pages
    for page in pages:  # that a page opened
        page.close()
    for context in contexts:
        context.close()
    profile.clear_cookies()
    browser = profile.new_cdp_session(first)
    for origin in origins:
        browser.send("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "local_storage,indexeddb"})
    browser.detach()
    assert not errors


@pytest.fixture
def logged(caplog):
    """What the app has logged so far. Whatever else goes on in this process logs as well: asyncio, say, that another
    test's browser went before its tasks."""
    return lambda: [record for record in caplog.records if record.name.partition(".")[0] in APP_LOGGERS]


@pytest.fixture
def copied(tmp_path):
    """The miniature in a folder of its own, as links, so that a file of it can be damaged."""
    folder = tmp_path / "mini"
    for file in MINI_FLUX.folder.rglob("*"):
        if file.is_file():
            link = folder / file.relative_to(MINI_FLUX.folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    return replace(MINI_FLUX, source=str(folder))


@pytest.fixture
def catalog_for_one_test(monkeypatch):
    """What a test gives to the catalog is gone after it."""
    own_catalog.begin(monkeypatch)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where the engine keeps its rulers while the tests run, for child processes too."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("TWINFRAME_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def worker(cache):
    """A worker on the CPU with the real miniature; its ruler takes one prompt instead of three."""
    from engine.runtime import studio
    from engine.runtime.device import Device
    from engine.serving.worker import Worker

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studio, "RULER_PROMPTS", 1)
        worker = Worker(("mini-flux",), Device("cpu"))
        yield worker
        worker.close()


@pytest.fixture(scope="session")
def ask():
    """A request that is cheap on a CPU: four steps with one forward pass each."""
    from engine.request import CompareRequest

    def create(**fields):
        cheap = {"prompt": "a cat on a red background", "num_inference_steps": 4, "guidance_scale": 1.0, "seed": 7}
        return CompareRequest.create(**(cheap | fields))

    return create


@pytest.fixture(scope="session")
def until():
    """Wait for a condition instead of for a time."""

    def wait(condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.005)

    return wait
