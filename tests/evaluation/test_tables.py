"""Tables word by word, of figures that are all different, so that none can stand for another."""

from typing import Any

from infformer.evaluation.report import format_comparison, format_table


def figures(number: int) -> dict[str, Any]:
    """Of one situation; the number is seen in each, and in the nats of six documents of ten tokens."""
    return {
        "per_document": [{"tokens": 10, "nll": 2.5 * number}] * 6,
        "perplexity": {"token": 10.0 * number + 0.125, "word": 100.0 * number + 0.25},
        "perplexity_interval": {
            "token": [10.0 * number - 2.5, 10.0 * number + 3.5],
            "word": [100.0 * number - 20, 100.0 * number + 30],
        },
        "bits_per_byte": number / 8,
    }


def control(number: int, nats: float, low: float, high: float, better: int, equal: int = 0) -> dict[str, Any]:
    """Six documents, of which so many are read better, so many alike, and the others worse."""
    told = {"nats_per_token": nats, "interval": [low, high], "documents": 6, "better": better}
    told["worse"] = 6 - better - equal
    return {**figures(number), "difference": told}


PROTOCOL = {
    "segment": 64,
    "stride": 16,
    "warmup_documents": 0,
    "reset": "each document begins with an empty memory",
    "dtype": "bfloat16",
    "memory": {"kind": "long_term"},
}
RESULTS: dict[str, Any] = {
    **figures(2),
    "before": figures(1),
    "controls": {
        "memory_off": control(3, 0.25, 0.125, 0.5, 1),
        "memory_of_another_document": control(4, -0.75, -1.5, 0.0625, 4),
        "memory_shuffled_in_time": control(5, 0.0625, 0.03125, 0.09375, 2, equal=1),
    },
    "by_recency": [
        {"previous_occurrence": "within_window", "tokens": 1000, "nll": 2500.0},
        {"previous_occurrence": "beyond_window", "tokens": 2000, "nll": 8000.0},
        {"previous_occurrence": "never", "tokens": 0, "nll": 0.0},
    ],
    "documents": 6,
    "tokens": 75050,
    "words": 42095,
    "bytes": 239990,
    "protocol": PROTOCOL,
}


def test_the_table_of_a_run():
    assert format_table(RESULTS).splitlines() == [
        "perplexity                       per token              (95 %)    per word   bits/byte  protocol",
        "before training                     10.125      7.500 – 13.500      100.25      0.1250  "
        "windows of 64, stride 16, bfloat16",
        "after training                      20.125     17.500 – 23.500      200.25      0.2500  "
        "windows of 64, stride 16, bfloat16",
        "  its memory off                    30.125     27.500 – 33.500      300.25      0.3750  "
        "windows of 64, stride 16, bfloat16",
        "  another document's memory         40.125     37.500 – 43.500      400.25      0.5000  "
        "windows of 64, stride 16, bfloat16",
        "  its memory shuffled in time       50.125     47.500 – 53.500      500.25      0.6250  "
        "windows of 64, stride 16, bfloat16",
        "memory off: +0.2500 nats per token (95 %: +0.1250 to +0.5000), worse on 5 of 6 documents",
        "memory of another document: -0.7500 nats per token (95 %: -1.5000 to +0.0625), worse on 2 of 6 documents",
        "memory shuffled in time: +0.0625 nats per token (95 %: +0.0312 to +0.0938), worse on 3 of 6 documents, "
        "equal on 1",
        "the memory changes -0.5000 (95 %: -0.5000 to -0.5000) nats per token by what is specific to the document, "
        "+0.2500 (95 %: +0.2500 to +0.2500) by its mere presence: it gains by its document",
        "nats per token that occurred last: 2.500 within the window (1,000), 4.000 before the window (2,000)",
        "6 documents, 75,050 tokens, 42,095 words, 239,990 bytes; each document begins with an empty memory; "
        "intervals over documents",
    ]


def test_the_table_of_an_evaluation_without_controls():
    lines = format_table({**RESULTS, "before": None, "controls": {}}).splitlines()
    assert [line[:14] for line in lines] == [
        "perplexity    ", "this model    ", "what of its me", "nats per token", "6 documents, 7"
    ]  # fmt: skip
    assert lines[2] == (
        "what of its memory's gain is specific to the document is not known: measured without controls (controls=false)"
    )
    assert lines[1].split()[2:8] == ["20.125", "17.500", "–", "23.500", "200.25", "0.2500"]


def test_the_table_of_a_single_document_has_no_intervals():
    alone = {"perplexity_interval": {"token": None, "word": None}}
    off = control(3, 0.25, 0, 0, 0) | alone
    off["difference"] |= {"interval": None, "documents": 1, "better": 0, "worse": 1}
    lines = format_table({**RESULTS, **alone, "before": None, "controls": {"memory_off": off}}).splitlines()
    assert [line.split("windows")[0].split()[-3:] for line in lines[1:3]] == [
        ["20.125", "200.25", "0.2500"],
        ["30.125", "300.25", "0.3750"],
    ]
    assert lines[3] == "memory off: +0.2500 nats per token, worse on 1 of 1 documents"


def row(tokens: int, nats: float | None, low: float = 0.0, high: float = 0.0) -> dict[str, Any]:
    return {"tokens": tokens, "nats_per_token": nats, "interval": None if nats is None else [low, high]}


ALIKE = {"protocol": "disjoint segments of 64, float32", "cost": None, "parts_unknown": None}
COMPARISON: dict[str, Any] = {
    "protocol": "disjoint segments of 64, float32",
    "documents": 6,
    "tokens": 75050,
    "a": {"checkpoint": "outputs/control", "perplexity": {"token": 62.125, "word": 1575.5}, **ALIKE},
    "b": {"checkpoint": "outputs/tiny", "perplexity": {"token": 60.625, "word": 1507.25}, **ALIKE},
    "difference": {"nats_per_token": -0.5, "interval": [-0.75, -0.25], "documents": 6, "better": 4, "worse": 2},
    "parts": {
        "specific": {"nats_per_token": -0.375, "interval": [-0.5, -0.25]},
        "presence": {"nats_per_token": -0.25, "interval": [-0.375, 0.25]},
        "without_memory": {"nats_per_token": 0.125, "interval": [0.0625, 0.1875]},
    },
    "by_position": [
        {"from": 0, "to": 64, **row(256, 0.25, -0.125, 0.375)},
        {"from": 1024, "to": 2048, **row(5120, -1.25, -2.0, -0.5)},
        {"from": 2048, "to": 4096, **row(0, None)},
    ],
    "by_recency": [
        {"previous_occurrence": "within_window", **row(1000, 0.0625, 0.03125, 0.125)},
        {"previous_occurrence": "beyond_window", **row(2000, -0.875, -1.0, -0.625)},
        {"previous_occurrence": "never", **row(3000, 0.1875, -0.25, 0.4375)},
    ],
}


def test_the_table_of_a_comparison():
    *lines, verdict = format_comparison(COMPARISON).splitlines()
    assert lines == [
        "A: perplexity 62.125 per token, 1575.50 per word (disjoint segments of 64, float32)  outputs/control",
        "B: perplexity 60.625 per token, 1507.25 per word (disjoint segments of 64, float32)  outputs/tiny",
        "B less A                            nats per token            95 % interval       tokens",
        "all tokens                                 -0.5000       -0.7500 to -0.2500       75,050",
        "  specific to the document                 -0.3750       -0.5000 to -0.2500       75,050",
        "  presence of a memory                     -0.2500       -0.3750 to +0.2500       75,050",
        "  with memories off                        +0.1250       +0.0625 to +0.1875       75,050",
        "  tokens 0 to 64                           +0.2500       -0.1250 to +0.3750          256",
        "  tokens 1,024 to 2,048                    -1.2500       -2.0000 to -0.5000        5,120",
        "  last within the window                   +0.0625       +0.0312 to +0.1250        1,000",
        "  last before the window                   -0.8750       -1.0000 to -0.6250        2,000",
        "  last nowhere                             +0.1875       -0.2500 to +0.4375        3,000",
    ]
    assert verdict == (
        "B reads better than A, in part by what is specific to the document: -0.5000 nats per token (perplexity -39.35 "
        "%), 95 % interval over 6 documents -0.7500 to -0.2500; better on 4 of 6 documents. Of that, -0.3750 (95 %: "
        "-0.5000 to -0.2500) is specific to the document, -0.2500 (95 %: -0.3750 to +0.2500) the mere presence of a "
        "memory, and +0.1250 (95 %: +0.0625 to +0.1875) is there with memories off."
    )


def test_the_verdict_turns_with_the_sign():
    worse = {"nats_per_token": 0.5, "interval": [0.25, 0.75], "documents": 6, "better": 1, "worse": 3}
    without_parts = {**COMPARISON, "parts": None}
    verdict = format_comparison({**without_parts, "difference": worse}).splitlines()[-1]
    assert verdict == (
        "B reads worse than A: +0.5000 nats per token (perplexity +64.87 %), 95 % interval over 6 documents +0.2500 to "
        "+0.7500; better on 1 of 6 documents, equal on 2."
    )
    unsure = {**worse, "interval": [-0.25, 0.75]}
    verdict = format_comparison({**COMPARISON, "difference": unsure}).splitlines()[-1]
    assert verdict.startswith("No difference can be told: B against A +0.5000 nats per token")
