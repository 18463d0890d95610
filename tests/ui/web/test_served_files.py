"""The shelf that served files lie on."""

from __future__ import annotations

import os
import shutil

from ui.web.served_files import Shelf


def test_the_shelf_outlives_a_cleaned_temporary_folder_and_sweeps_only_what_is_old(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr("ui.web.served_files.SWEEP_SECONDS", 0)
    shelf = Shelf()
    shutil.rmtree(shelf.root)
    fresh = shelf.new()
    old = shelf.new()
    (tmp_path / "recorded").mkdir()
    pinned = shelf.pin(tmp_path / "recorded")
    for folder in (old, pinned):
        os.utime(folder, (0, 0))
    assert shelf.new().is_dir()
    assert (fresh.is_dir(), old.exists(), pinned.is_dir()) == (True, False, True)
    shelf.close()
    assert not shelf.root.exists()
