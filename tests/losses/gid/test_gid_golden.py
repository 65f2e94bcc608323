"""tools/check_golden.py on recorded arrays of GID, and on those of another configuration."""

import gid_fixture
import numpy as np
from golden_tool import compared, write
from test_naive_gid import fixture  # made once, which takes seconds


def results(arrays):
    """The arrays that are computed from others."""
    kept = ("gi_diff_all", "gi_box_all", "gt_labels")
    prefixes = (*gid_fixture.SCENARIOS, "out_", "adapter_out_", "adapter_all_")
    return {n for n in arrays if n in kept or n.startswith(prefixes) and not n.endswith("_images")}


def test_recorded_fixture(tool, shared, capsys):
    path = shared / "golden" / "gid.npz"
    assert tool.main([str(path)]) == 0
    output = capsys.readouterr().out
    assert "gid: pass" in output
    with np.load(path) as recorded:
        assert set(compared(output, "pass")) == results(recorded.files)


def test_fixture_of_another_configuration(tool, tmp_path, capsys):
    assert tool.main([write(tmp_path, fixture())]) == 0
    output = capsys.readouterr().out
    assert "gid: pass" in output and set(compared(output, "pass")) == results(fixture())


CHANGED = [
    *("gi_diff_all", "gi_box_all", "gt_labels", "all_gi_count", "all_gi_image", "all_gi_boxes"),
    *("all_gi_scores", "all_gi_index", "all_gi_from_teacher", "all_gi_level", "all_response_mask"),
    *("all_pooled_teacher", "all_pooled_student", "two_loss_raw_feature", "all_loss_raw_relation_f64"),
    *("empty_loss_raw_relation", "all_loss_weighted_reg_deltas", "all_mode_feature_L1_b0.5"),
    *("all_mode_reg_BCE", "all_grad_weighted_total__student_logits", "all_paper_gi_score_all"),
    *("empty_grad_weighted_total__student_feat_p4", "empty_two_grad_cls_logits__student_logits"),
    *("adapter_all_grad_relation__adapter_bias", "adapter_all_pooled_student", "all_paper_gi_boxes"),
]


def test_changed_arrays_fail(tool, tmp_path, capsys):
    """Those alone, all at once: a run takes seconds."""
    arrays = dict(fixture())
    for name in CHANGED:
        arrays[name] = array = np.array(arrays[name])
        integer, first = array.dtype.kind in "iu", array.flat[0]
        array.flat[0] = first + (1 if integer else 1e-3 * max(1, abs(first)))
    assert tool.main([write(tmp_path, arrays)]) == 1
    assert set(compared(capsys.readouterr().out, "FAIL")) == set(CHANGED)
