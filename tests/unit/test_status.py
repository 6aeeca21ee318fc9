"""`python -m genrecal_ds.status`: from files alone, also while they are being written."""

import json
import time

import pytest

from genrecal_ds.status import main, stages_of, state_of

pytestmark = pytest.mark.unit


def write_run(folder, steps_done=40, steps=100):
    stage = folder / "align"
    (stage / "checkpoints").mkdir(parents=True)
    (stage / "faults").mkdir()
    (stage / "start.json").write_text(json.dumps({"steps": steps}))
    lines = [
        {
            "step": step, "seconds": 2.0 if step > 20 else 9.0, "metrics": {"loss": 1 / step},
            "tokens_per_second": {"step": 1000.0}, "skipped": 1, "world_size": 4,
        }
        for step in range(1, steps_done + 1)
    ]  # fmt: skip
    torn = '{"step": 41, "sec'
    (stage / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + torn)
    ledger = [{"step": step, "batch": "0"} for step in range(1, steps_done + 1)]
    (stage / "ledger.jsonl").write_text("".join(json.dumps(x) + "\n" for x in ledger))
    saved = {"step": 30, "seconds": 1.5, "bytes": 3 << 20, "time": time.time() - 60}
    (stage / "checkpoints/saves.jsonl").write_text(json.dumps(saved) + "\n")
    spike = {"kind": "spike of loss", "step": 12}
    for rank in range(2):  # both ranks note the same one
        (stage / f"faults/rank{rank}.jsonl").write_text(json.dumps(spike) + "\n")
    return stage


def test_facts_of_a_running_stage(tmp_path):
    write_run(tmp_path)
    (stage,) = stages_of(tmp_path)
    assert stage["step"] == 40 and stage["steps"] == 100
    assert stage["seconds_left"] == 60 * 2.0  # by the recent speed, not by the warm-up's
    assert stage["checkpoint"]["step"] == 30
    assert (stage["skipped_steps"], stage["spikes"], stage["stalls"]) == (1, 1, 0)
    assert state_of(tmp_path).endswith("ago")


def test_states_and_output(tmp_path, capsys):
    write_run(tmp_path)
    stop = {"why": "SIGUSR1", "stage": "align", "step": 40}
    (tmp_path / "STOPPED").write_text(json.dumps(stop))
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "stopped by SIGUSR1 in align, step 40" in shown
    assert "40/100" in shown and "2 min 00 s" in shown and "1 skipped" in shown
    (tmp_path / "DONE").touch()
    assert main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "done"
    assert main([str(tmp_path / "nothing")]) == 2
    assert "name a run_dir" in capsys.readouterr().err
