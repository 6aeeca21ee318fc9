"""Each sign of a run that does not distil, and silence where all is well or it is early."""

import pytest

from genrecal_ds.training.guards.health import warnings_of

pytestmark = pytest.mark.unit

SOUND = {
    "kl_boundary": 0.5, "probe/kl_shuffled_boundary": 6.0, "ar_other": 0.1,
    "probe/ar_zeroed_other": 0.12, "gradient/kl_boundary": 1.0, "gradient/kl_other": 0.02,
    "agree_other": 0.98,
}  # fmt: skip


def test_a_sound_run_and_steps_without_probes_are_silent():
    assert warnings_of(SOUND, 1.0) == {}
    assert warnings_of({}, 1.0) == {}


@pytest.mark.parametrize(
    ("changed", "name"),
    [({"probe/kl_shuffled_boundary": 0.9}, "boundary rows do not listen"),
     ({"probe/ar_zeroed_other": 0.7}, "other rows listen"),
     ({"gradient/kl_other": 1.5}, "gradient comes from other rows"),
     ({"agree_other": 0.4}, "the head does not agree")],
)  # fmt: skip
def test_each_sign(changed, name):
    found = warnings_of(SOUND | changed, 0.6)
    assert list(found) == [name]
    assert warnings_of(SOUND | changed, 0.4) == {}  # the Recalibrator starts from noise
