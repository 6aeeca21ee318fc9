"""A warning that comes again is not shown again, whatever happened to Python's filters."""

import warnings

import pytest

from genrecal_ds.console.warn_once import warn_once

pytestmark = pytest.mark.unit


@pytest.fixture
def shown():
    """The warnings that reach what shows them."""
    found = []
    with warnings.catch_warnings():  # puts back what the test replaces
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_: found.append(str(message))
        yield found


def step(text, category=FutureWarning):
    with warnings.catch_warnings():  # forgets what was shown
        pass
    warnings.warn(text, category, stacklevel=1)


def test_each_warning_is_shown_once(shown):
    warn_once()
    for text in ("a", "b", "a", "b"):
        step(text)
    step("a", UserWarning)
    assert shown == ["a", "b", "a"]


def test_python_alone_would_show_it_again(shown):
    step("a")
    step("a")
    assert shown == ["a", "a"]


def test_what_the_user_ignores_is_not_shown(shown):
    warn_once()
    warnings.simplefilter("ignore")
    step("a")
    assert shown == []
