from qpruner.errors import brief, cut, listed


def test_values_are_shown_as_they_are_until_they_are_long() -> None:
    assert brief("a\nb") == r"'a\nb'" and brief(None) == "None" and brief([1, "x"]) == "[1, 'x']"
    for long in ("x" * 1000, 10**1000, [["x" * 99] * 99] * 99, dict.fromkeys(range(99), "y" * 99)):
        assert len(brief(long)) <= 120


def test_text_is_cut_in_its_middle() -> None:
    assert cut(" a\n  b ") == "a b" and cut("x" * 300) == "x" * 300
    shortened = cut("begin " + "x" * 1000 + " end", 100)
    assert len(shortened) == 100 and shortened.startswith("begin xx") and shortened.endswith("xx end")


def test_names_are_listed_until_they_are_many() -> None:
    assert listed([]) == "none" and listed(["a", "b", "c"]) == "a, b, c"
    assert listed(list("abcdefgh")) == "a, b, c and 5 more"
