"""Arrow schemas of every table. Ids are SHA-256 in hex, scores are integers (cos * 10^6)."""

import pyarrow as pa

ID = pa.string()
SCORE = pa.int32()


def _fields(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])


SCHEMAS: dict[str, pa.Schema] = {
    # What the listing shows, before a byte is read: loose images and whole containers.
    "listing": _fields(
        key=pa.string(),
        kind=pa.string(),
        stamp=pa.string(),
        size=pa.int64(),
        sidecars=pa.list_(pa.string()),
    ),
    # Captions that stand in files of their own (CSV, JSONL, Parquet).
    "file_captions": _fields(key=pa.string(), caption=pa.string(), licence=pa.string()),
    "objects": _fields(
        key=pa.string(),
        member=pa.string(),
        stamp=pa.string(),
        offset=pa.int64(),
        size=pa.int64(),
        image_id=ID,
        captions=pa.list_(pa.string()),
        licence=pa.string(),
        rule=pa.string(),
        detail=pa.string(),
    ),
    # Members of containers, and loose objects, that were forgotten: keyed hashes in place of names.
    "forgotten": _fields(
        key=pa.string(),
        stamp=pa.string(),
        id=pa.string(),
        image=pa.string(),
        place=pa.string(),
    ),
    # Files of the corpus with records about its images.
    "files": _fields(key=pa.string(), stamp=pa.string()),
    # Where a model looked while it answered: weights onto the cells of a grid, in billionths; by
    # the sink rules norm and dims, `sink` and its threshold are in thousandths.
    "maps": _fields(
        map_id=ID,
        image_id=ID,
        status=pa.string(),
        answer=pa.string(),
        steps=pa.int32(),
        height=pa.int32(),
        width=pa.int32(),
        grounding=pa.list_(pa.int32()),
        sink=pa.list_(pa.int32()),
        sink_rule=pa.string(),
        sink_threshold=pa.int32(),
        heads=pa.string(),
    ),
    # Labels and boxes drawn over their picture; the name is that of what is drawn.
    "overlays": _fields(name=ID, image_id=ID, jpeg=pa.binary()),
    # Heads that were chosen by what samples with boxes say of each, in billionths.
    "heads": _fields(
        mode=pa.string(), layer=pa.int32(), head=pa.int32(), mass=pa.int64(), samples=pa.int32()
    ),
    "masses": _fields(
        name=ID,
        mode=pa.string(),
        status=pa.string(),
        layers=pa.int32(),
        heads=pa.int32(),
        masses=pa.list_(pa.int64()),
    ),
    "headers": _fields(
        image_id=ID,
        bytes=pa.int64(),
        format=pa.string(),
        width=pa.int32(),
        height=pa.int32(),
        frames=pa.int32(),
        rule=pa.string(),
        detail=pa.string(),
    ),
    "looks": _fields(
        image_id=ID,
        rule=pa.string(),
        detail=pa.string(),
        phash=pa.uint64(),
        dhash=pa.uint64(),
        thumbnail=pa.binary(),
        contrast=pa.int32(),
        sharpness=pa.int32(),
        entropy=pa.int32(),
        informative=pa.bool_(),
    ),
    # Vectors have their dimension as well, see `tables.vector_rows`; these stand for empty tables.
    "vectors": _fields(image_id=ID),
    "texts": _fields(caption_id=ID),
    "captions": _fields(caption_id=ID, text=pa.string()),
    # Every candidate caption of every image that can be used.
    "image_captions": _fields(image_id=ID, caption_id=ID),
    # One row an image that decodes and passes the limits; the representative object's key with it.
    "images": _fields(
        image_id=ID,
        key=pa.string(),
        member=pa.string(),
        bytes=pa.int64(),
        format=pa.string(),
        width=pa.int32(),
        height=pa.int32(),
        licence=pa.string(),
    ),
    "aligned": _fields(image_id=ID, caption_id=ID, clip_score=SCORE),
    "survivors": _fields(
        image_id=ID, survivor_id=ID, distance=pa.int32(), likeness=SCORE, caption_id=ID
    ),
    "hashes": _fields(image_id=ID, flat=pa.bool_(), hashes=pa.list_(pa.uint64())),
    # Of an image or a caption: largest score with any reference, and the sum of the terms.
    "values": _fields(image_id=ID, value=pa.int64()),
    "sums": _fields(id=ID, largest=SCORE, total=pa.int64()),
    "references": _fields(image_id=ID, caption_id=ID),
    "eligible": _fields(image_id=ID, caption_id=ID, clip_score=SCORE),
    "members": _fields(image_id=ID),
    # Row i of the lists belongs to row i of the members; neighbours are row numbers, best first.
    "lists": _fields(row=pa.int32(), neighbours=pa.list_(pa.int32()), scores=pa.list_(SCORE)),
    # Longer lists over distinct vectors: all that score above the floor are listed.
    "kept_lists": _fields(
        row=pa.int32(), neighbours=pa.list_(pa.int32()), scores=pa.list_(SCORE), floor=SCORE
    ),
    "items": _fields(id=ID, row=pa.int32()),
    "bands": _fields(
        space=pa.string(),
        low=SCORE,
        high=SCORE,
        scores=pa.int64(),
        truncated=pa.int64(),
        crowded=pa.int64(),
    ),
    "pairs": _fields(
        pair_id=ID,
        query=ID,
        target=ID,
        ties=pa.list_(
            pa.struct(
                {
                    "space": pa.string(),
                    "score": SCORE,
                    "rank": pa.int32(),
                    "in_band": pa.bool_(),
                }
            )
        ),
        negatives=pa.list_(ID),
    ),
    # What is known of pairs, by rows of `mined_images`; lists have an entry a space.
    "mined_images": _fields(image_id=ID, caption_id=ID),
    "judged": _fields(
        pair_id=ID,
        query=pa.int32(),
        target=pa.int32(),
        scores=pa.list_(SCORE),
        cut=pa.list_(pa.int8()),
        candidates=pa.list_(pa.int32()),
        good=pa.list_(pa.int8()),
        below=pa.list_(SCORE),
        above=pa.list_(SCORE),
        under=pa.list_(SCORE),
        over=pa.list_(SCORE),
    ),
    "labels": _fields(
        pair_id=ID,
        instructions=pa.list_(pa.string()),
        description=pa.string(),
        labeller=pa.string(),
        model=pa.string(),
        prompt=pa.string(),
    ),
    # Keys of the requests that were made about a pair, in order.
    "asked": _fields(
        pair_id=ID,
        query=ID,
        target=ID,
        query_caption_id=ID,
        target_caption_id=ID,
        requests=pa.list_(pa.string()),
    ),
    # What was asked of a model and paid for: of the request its digest, and what it was about.
    "responses": _fields(
        key=ID,
        attempt=pa.int32(),
        status=pa.string(),
        text=pa.string(),
        finish_reason=pa.string(),
        model=pa.string(),
        input_tokens=pa.int64(),
        output_tokens=pa.int64(),
        cached_tokens=pa.int64(),
        # 10^-9 of the currency; null where it is not known.
        cost=pa.int64(),
        images=pa.list_(ID),
        captions=pa.list_(ID),
        stage=pa.string(),
        created=pa.int64(),
    ),
    # What a judge said of the instructions of pairs; `number` counts from 1. Of a pair without an
    # answer one row, its number 0 and its reason why there is none. `asked`: what it was asked.
    "verdicts": _fields(
        pair_id=ID,
        number=pa.int32(),
        verdict=pa.string(),
        reason=pa.string(),
        asked=pa.string(),
        model=pa.string(),
        prompt=pa.string(),
        requests=pa.list_(pa.string()),
    ),
    # What a judge said of the target and hard negatives in one line, in the order they were shown;
    # `place` counts from 1 and is 0 where there is no answer.
    "line_ups": _fields(
        pair_id=ID,
        place=pa.int32(),
        image_id=ID,
        verdict=pa.string(),
        best=pa.bool_(),
        reason=pa.string(),
        asked=pa.string(),
        model=pa.string(),
        prompt=pa.string(),
        requests=pa.list_(pa.string()),
    ),
    # Hard negatives that fit after all.
    "positives": _fields(pair_id=ID, image_id=ID),
    # Scores of target and best hard negative against query and instruction `number`, from 1.
    "preferences": _fields(
        pair_id=ID, number=pa.int32(), target=SCORE, negative=SCORE, asked=pa.string()
    ),
    # Verdicts of people, one row an item: a pair with one of its instructions.
    "gold": _fields(
        pair_id=ID,
        query=ID,
        target=ID,
        instruction=pa.string(),
        verdict=pa.string(),
        reason=pa.string(),
    ),
    # Numbers that a stage calibrated on the corpus, such as a cut.
    "facts": _fields(name=pa.string(), value=pa.int64()),
    "drops": _fields(
        level=pa.string(),
        id=pa.string(),
        stage=pa.string(),
        rule=pa.string(),
        value=pa.int64(),
        detail=pa.string(),
    ),
    "fates": _fields(
        level=pa.string(),
        id=pa.string(),
        fate=pa.string(),
        stage=pa.string(),
        rule=pa.string(),
        value=pa.int64(),
        detail=pa.string(),
        image_id=ID,
    ),
}
