"""Next-byte distributions and their KL, summed token by token: the definition that tests use."""

from genrecal_ds.ops.next_byte import END, STOP


def spelt_out(probabilities, pieces, end, token, depth):
    """{symbol: probability}, unnormalised: of one boundary, token by token."""
    prefix, found = (pieces[token] or b"")[:depth], {}
    for candidate, piece in enumerate(pieces):
        if candidate == end:
            symbol = END if not depth else None
        elif not piece or not piece.startswith(prefix):
            symbol = None
        else:
            symbol = piece[depth] if len(piece) > depth else STOP
        if symbol is not None:
            found[symbol] = found.get(symbol, 0.0) + probabilities[candidate]
    return found


def kl_spelt_out(theirs, ours):
    shared = (theirs.keys() & ours.keys()) - {STOP}
    both = [{symbol: side[symbol] for symbol in shared} for side in (theirs, ours)]
    rests = [[p for symbol, p in side.items() if symbol not in shared] for side in (theirs, ours)]
    if all(rests):
        for side, rest in zip(both, rests, strict=True):
            side["rest"] = sum(rest)
    sums = [sum(side.values()) for side in both]
    total = 0.0
    for symbol in both[0]:
        p, q = (side[symbol] / whole for side, whole in zip(both, sums, strict=True))
        total = total + p * (p / q).log()
    return total
