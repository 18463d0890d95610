"""Every command in this process, and what all of them owe to whoever gives them something broken.

`COMMANDS` holds the arguments of each command that takes what may be broken, with `{out}` for what it would write. A
test gives `refused` a command and what is wrong, such as `("--weights", folder)`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from engine import __main__ as cli

PROMPT = ("--prompt", "a cat on a red background")
CPU = ("--device", "cpu")
COMMANDS = {
    "models": ("models",),
    "compare": ("compare", *PROMPT, *CPU, "--steps", "1", "--precision", "bf16", "nvfp4", "--out", "{out}"),
    "record": ("record", *PROMPT, *CPU, "--steps", "1", "--precision", "bf16", "nvfp4", "--out", "{out}"),
    "bench": ("bench", *CPU, "--steps", "1", "--repeats", "1", "--out", "{out}/bench.json"),
    "evaluate": ("evaluate", *CPU, "--steps", "1", "--precision", "mxfp8", "--out", "{out}"),
    "sensitivity": ("sensitivity", *CPU, "--out", "{out}/quality.json"),
    "tune": ("tune", *CPU, "--recipe", "{out}/recipe.json", "--out", "{out}/quality.json"),
}
"""Those that ask for `--prompts` besides are in `READERS`; `inspect` reads no file."""
READERS = ("evaluate", "sensitivity", "tune")
MAKERS = ("compare", "record", "bench", *READERS)
"""Those that make anything."""


def run(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    monkeypatch.setattr(sys, "argv", ["engine", *map(str, args)])
    try:
        cli.main()
        status = 0
    except SystemExit as ended:
        status = ended.code
    return status, *capsys.readouterr()


def arguments(name: str, out: Path, *more: object) -> list[str]:
    """A command's arguments; those that read prompts get two where `more` has none."""
    args = [arg.format(out=out) for arg in COMMANDS[name]]
    if name in READERS and "--prompts" not in more:
        file = next(folder for folder in out.parents if folder.is_dir()) / "two-prompts.txt"
        file.write_text("a cat on a red background\na dog on a blue background\n")
        args += ["--prompts", str(file)]
    return [*args, *map(str, more)]


def refused(monkeypatch, capsys, out: Path, name: str, *more: object) -> str:
    """See that a command takes what is wrong as a mistake: exit 2, one sentence, and nothing at `out`, which is not
    there; gives the sentence."""
    assert not out.exists()
    status, said, err = run(monkeypatch, capsys, *arguments(name, out, *more))
    assert "Traceback" not in err
    assert (status, said) == (2, ""), err
    assert err.endswith(".\n") and len(err.splitlines()) == 1, err
    assert not out.exists(), [str(file) for file in out.rglob("*")]
    return err.strip()
