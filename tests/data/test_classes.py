import logging

import numpy as np
import pytest

from vir_jax.data import CorruptExampleError
from vir_jax.data.classes import check_classes, class_difference, match_classes


class Labelled:
    """Examples with these labels; example i is an image of the value i."""

    def __init__(self, class_names, labels, num_classes=None):
        self.class_names, self.labels = tuple(class_names), labels
        self.num_classes = len(self.class_names) if num_classes is None else num_classes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": np.full((1, 1, 3), index, np.uint8), "label": self.labels[index]}

    def name(self, index):
        return f"example {index}"


def labels(source):
    return [source[index]["label"] for index in range(len(source))]


def test_equal_classes_leave_a_source_as_it_is():
    source = Labelled("ab", [0, 1])
    assert match_classes(source, ["a", "b"], "the data") is source


@pytest.mark.parametrize(
    ("own", "given", "known", "expected", "said"),
    [
        ("b", [0, 0], "ab", [1, 1], "has 1 of the model's 2 classes; labels"),
        ("ca", [0, 1], "abc", [2, 0], "has 2 of the model's 3 classes, and in another order"),
        ("ba", [0, 1, 1], "ab", [1, 0, 0], "has 2 of the model's 2 classes, and in another order"),
    ],
)
def test_labels_are_matched_by_name(own, given, known, expected, said, caplog):
    with caplog.at_level(logging.WARNING):
        matched = match_classes(Labelled(own, given), tuple(known), "the data")
    assert labels(matched) == expected
    assert (matched.num_classes, matched.class_names, len(matched)) == (len(known), tuple(known), len(given))
    assert matched.name(1) == "example 1"
    assert matched[1]["image"][0, 0, 0] == 1
    assert said in caplog.text


def test_an_unknown_class_is_refused_by_name():
    with pytest.raises(ValueError, match=r"the data has classes that the model does not know: 'zebra'\."):
        match_classes(Labelled(["a", "zebra"], [0]), ["a", "b"], "the data")
    many = [f"class {number}" for number in range(1000)]
    with pytest.raises(ValueError, match=r"'class 4' and 995 more\. It knows 'a', 'b'$"):
        match_classes(Labelled(many, [0]), ["a", "b"], "the data")


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_out_of_range_is_no_other_class(label):
    with pytest.raises(CorruptExampleError, match=f"label {label} is not one of 2 classes"):
        match_classes(Labelled("ba", [label]), ["a", "b"], "the data")[0]


@pytest.mark.parametrize(
    ("class_names", "num_classes", "message"),
    [
        ("ab", 3, r"num_classes = 3, but 2 class_names \('a', 'b'\)"),
        ("a", 1, r"has 1 class\(es\) \('a'\): expected at least 2"),
        ("", 0, r"has 0 class\(es\) \(none\)"),
        (["a", "b", "a"], 3, "several classes of one name: 'a'"),
        ([0, 1], 2, "no text: 0, 1"),
    ],
)
def test_classes_that_cannot_be_used(class_names, num_classes, message):
    with pytest.raises(ValueError, match=message):
        check_classes(Labelled(class_names, [], num_classes), "the data", at_least=2)


def test_differences_are_named():
    assert class_difference("ab", ["a", "b"]) is None
    assert class_difference("ab", "ac") == "2 classes, now 2; gone: 'b'; new: 'c'"
    assert class_difference("ab", "abc") == "2 classes, now 3; gone: none; new: 'c'"
    assert class_difference("abc", "acb") == "class 1 was 'b' and is 'c': the same names in another order"
