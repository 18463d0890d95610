"""Each fault once, at a random point of the real app; `python -m tests.support.load faults` strikes each twenty
times."""

from tests.support import faults

ELSEWHERE = {"a segmentation fault", faults.KILLED, faults.UNREACHABLE}
"""Each takes torch another start, or the hub's library half a minute of retries; see test_process.py, test_hub.py."""


def test_each_fault_fails_one_request_in_one_sentence_and_the_next_succeeds(tmp_path):
    kinds = tuple(kind for kind in faults.FURTHEST if kind not in ELSEWHERE)
    found = faults.run(tmp_path, 1, kinds, seed=1)
    fine = {"times": 1, "one_sentence": 1, "next_succeeded": 1, "broken_files": 0}
    assert found["kinds"] == dict.fromkeys(kinds, fine)
    said = found["said"]
    assert all("ran out of memory" in said[kind] for kind in kinds if "out of memory" in kind)
    assert "being started again" in said["a poisoned CUDA context"] and found["engine_restarts"] == 1
    assert "being changed" in said["a checkpoint that changes while it is read"]
    assert "disk is full" in said["a full disk"] and str(tmp_path) not in said["a full disk"]
    assert "ExternalError" in said["a failing video encoder"]
