"""The samples of the gradient test: unequal micro-batches, text beside pictures."""

from genrecal_ds.data.index import ShardIndex
from genrecal_ds.data.plan import PADDING


def steps_of(index: ShardIndex) -> list[list[tuple[int, ...]]]:
    """Two steps of four micro-batches [step][micro-step * 2 + rank].

    In each first micro-step one rank has text only (in the second step it is rank 0, where a
    stale gradient of the first step would be added to), the other pictures; a placeholder
    slot and unequal numbers of samples make the ranks' row counts differ.
    """
    text = [i for i, count in enumerate(index.records["num_images"]) if count == 0]
    image = [i for i, count in enumerate(index.records["num_images"]) if count]
    # longest texts first: the two-turn samples are among them
    image.sort(key=lambda i: -int(index.records["text_bytes"][i]))
    a, b, c, d, e, f, g, h = (image[len(image) * k // 8] for k in range(8))
    return [
        [(a, h), (text[0],), (text[1], b), (g, c)],
        [(text[2],), (a, d, text[3]), (e, PADDING), (f, h)],
    ]
