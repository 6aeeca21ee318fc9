"""Functions of a library as questions and answers."""

import pytest

from launch.real.functions import functions

pytestmark = pytest.mark.unit
MODULE = '''
class Clock:
    def hour(self, seconds):
        """Return the hour."""
        if seconds < 0:
            raise ValueError("time before the beginning")
        return seconds // 3600

    def short(self):
        """Too short an answer."""
        return 1


def silent(values):
    ordered = sorted(values)
    return ordered[len(ordered) // 2] + ordered[-1] + ordered[0]
'''


def test_a_method_starts_at_the_margin_and_short_or_silent_ones_are_left_out(tmp_path):
    for place in ("clock.py", "test/test_clock.py", "broken.py"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_text("def (" if place == "broken.py" else MODULE)
    ((module, question, answer),) = functions(tmp_path)
    assert module == "clock"
    assert question == 'def hour(self, seconds):\n    """Return the hour."""'
    assert answer == (
        'if seconds < 0:\n    raise ValueError("time before the beginning")\nreturn seconds // 3600'
    )
