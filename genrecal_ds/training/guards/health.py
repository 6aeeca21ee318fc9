"""Reads from a logged step's probes the signs that the method does not work.

Each sign is a comparison that fails only in an unsound run (docs/method.md, "Health"). A stage
prints a sign once, and none early: the Recalibrator starts from noise.
"""

from collections.abc import Mapping

SETTLED = 0.5  # share of the stage after which signs count
LISTENS = 2.0  # times: boundary KL with another sample's question, over the true one
UNMOVED = 0.5  # nats: CE of other rows may move by so much when the question is zeroed
AGREES = 0.5  # share of other rows whose likeliest token is the teacher's


def warnings_of(metrics: Mapping[str, float], progress: float) -> dict[str, str]:
    """Return {name: sentence} of the bad signs. progress: share of the stage that is done."""
    if progress < SETTLED:
        return {}
    warnings = {}
    shuffled, true = metrics.get("probe/kl_shuffled_boundary"), metrics.get("kl_boundary")
    if shuffled is not None and true is not None and shuffled < LISTENS * true:
        warnings["boundary rows do not listen"] = (
            f"boundary KL is {true:.3f} with the student's question states and {shuffled:.3f} with "
            f"another sample's, less than {LISTENS:g} times: the Recalibrator does not hear them; "
            "train align longer, or raise its learning rate"
        )
    zeroed, other = metrics.get("probe/ar_zeroed_other"), metrics.get("ar_other")
    if zeroed is not None and other is not None and abs(zeroed - other) > UNMOVED:
        warnings["other rows listen"] = (
            f"CE of non-boundary rows goes from {other:.3f} to {zeroed:.3f} without question "
            "states, though they read the teacher's own rows: it is not trained yet, or rows are "
            "shifted"
        )
    boundary, rest = metrics.get("gradient/kl_boundary"), metrics.get("gradient/kl_other")
    if boundary is not None and rest is not None and boundary < rest:
        warnings["gradient comes from other rows"] = (
            f"the student's gradient norm is {boundary:.2g} from boundary rows and {rest:.2g} from "
            "the others: what it is taught does not come through its own question states"
        )
    agrees = metrics.get("agree_other")
    if agrees is not None and agrees < AGREES:
        warnings["the head does not agree"] = (
            f"the teacher's likeliest token is the recalibrated one's on {agrees:.0%} of "
            "non-boundary rows, which read the teacher's own states: train align longer"
        )
    return warnings
