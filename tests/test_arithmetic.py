"""The arithmetic of detectron2's yaml files: the values are those of eval, and nothing else is read."""

import pytest

from distill_d2.arithmetic import calculate

OF_RETINANET = "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"
OF_PANOPTIC_DEEPLAB = "[int(x * 0.1 * 640) for x in range(5, 16)]"


@pytest.mark.parametrize(
    "text",
    [
        OF_RETINANET,
        OF_PANOPTIC_DEEPLAB,
        "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ]\n for x in [32, 64]]",
        "[a * b for a in [1, 2] for b in (3, 4.5)]",
        "[[y * 2 for y in x] for x in [[1, 2], [3]]]",
        "[y for x in [[1, 2], [3]] for y in x]",
        "[x for x in [x for x in [1]]]",
        "[[a, -b] for a, b in [(1, 2), [3, 4]]]",
        "[1] + [2.0]",
        "[[0.5, 1.0]] * 3",
        "((1, 2), [], ())",
        " 1e3 / 7 - -2**0.5 + 2**-2",
    ],
)
def test_equals_eval(text):
    # repr tells 1 from 1.0 and a list from a tuple.
    assert repr(calculate(text)) == repr(eval(text))


@pytest.mark.parametrize(
    "text, reason",
    [
        ("__import__('os').getpid()", "is not read"),
        ("os", "is not read"),
        ("[].append(1)", "is not read"),
        ("[x for x in [1] if x]", "'x' is not read"),
        ("(x for x in [1])", "is not read"),
        ("{1: 2}", "is not read"),
        ("[*[1]]", "is not read"),
        ("[1][0]", "is not read"),
        ("7 // 2", "is not read"),
        ("lambda: 1", "is not read"),
        ("f'{1}'", "is not read"),
        ("int('1')", "''1'' is not read"),
        ("range(3)", "is not read"),
        ("True", "is not read"),
        ("1 +", "is not an expression"),
        ("9 ** 9 ** 9", "exponent"),
        ("((2 ** 100) ** 100) ** 100", "more than 1024 bits"),
        ("[0] * 10 ** 9", "more than 10000 elements"),
        ("[x for x in range(10 ** 9)]", "more than 10000 elements"),
        ("[a for a in range(99) for b in range(99) for c in range(99)]", "more than 10000 elements"),
        ("[[[[[[a] * 9] * 9] * 9] * 9] * 9 for a in [1]]", "more than 10000 elements"),
        ("(" * 150 + "1" + ")" * 150 + "+1" * 60, "nested too deeply"),
        ("[" * 900, "is not an expression"),
        ("-" * 1900 + "1", "nested too deeply|is not an expression"),
        ("1" * 3000, "of 3000 characters"),
        ("1e308 * 10", "not finite"),
        ("1 / 0", "division by zero"),
        ("(-8) ** (1 / 3)", "complex"),
        ("[1] - 1", "unsupported operand"),
    ],
)
def test_refused(text, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        calculate(text)
    assert len(str(caught.value)) < 300
