"""What the tasks print, word by word, of figures that are all different."""

from infformer.tasks import retrieval_accuracy, sorting_accuracy

PROTOCOL = {"segment": 64, "reset": "each begins with an empty memory", "dtype": "bfloat16", "task": "passkey"}


def test_retrieval():
    """A line for each depth, a column for each length; whole answers first."""

    def cells(start: float) -> list[dict]:
        return [
            {
                "length": length,
                "depth": depth,
                "answers": 20,
                "exact_match": start + 0.1 * row + 0.01 * column,
                "accuracy": start + 0.1 * row + 0.01 * column + 0.005,
                "accuracy_free_running": 0.999,
            }
            for column, length in enumerate((4096, 1024))
            for row, depth in enumerate((0.0, 0.5))
        ]

    results = {"cells": cells(0.5), "controls": {"memory_off": cells(0.1)}, "chance": 1e-5, "protocol": PROTOCOL}
    assert retrieval_accuracy.format_accuracy(results).splitlines() == [
        "depth                               4,096            1,024",
        "0.00                        0.500 / 0.505    0.510 / 0.515",
        "0.50                        0.600 / 0.605    0.610 / 0.615",
        "0.00    memory off          0.100 / 0.105    0.110 / 0.115",
        "0.50    memory off          0.200 / 0.205    0.210 / 0.215",
        "passkey by depth (0: beginning) and length (tokens): whole answers free running / tokens teacher forced; 20 "
        "answers each, chance 1e-05; segments of 64 tokens, each begins with an empty memory, bfloat16",
    ]


def test_sorting():
    """A line for each length, a column for the model and for each counter; teacher forced first."""

    def accuracies(start: float) -> dict:
        return {"accuracy": start, "accuracy_free_running": start - 0.05}

    lengths = [
        {
            "length": length,
            "sequences": 30,
            **accuracies(start),
            "ideal_counters": {"last_2048": accuracies(start + 0.1), "chance": accuracies(start + 0.2)},
        }
        for length, start in ((1000, 0.3), (16000, 0.6))
    ]
    assert sorting_accuracy.format_accuracy({"lengths": lengths, "protocol": PROTOCOL}).splitlines() == [
        "length         this model        last 2048           chance",
        "1,000       0.300 / 0.250    0.400 / 0.350    0.500 / 0.450",
        "16,000      0.600 / 0.550    0.700 / 0.650    0.800 / 0.750",
        "accuracy teacher forced / free running, on 30 sequences of each length; segments of 64 tokens, each begins "
        "with an empty memory, bfloat16",
    ]
