"""detectron2's VOC datasets in both layouts."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin, load_voc_instances, register_pascal_voc
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from small_datasets import OBJECT, write_voc

from distill_d2.data import check_dataset, register_builtin_voc
from distill_d2.engine import argument_parser, lazy, load_config

NAMES = {
    2007: ["voc_2007_trainval", "voc_2007_train", "voc_2007_val", "voc_2007_test"],
    2012: ["voc_2012_trainval", "voc_2012_train", "voc_2012_val"],
}
ALL = NAMES[2007] + NAMES[2012]


@pytest.fixture(autouse=True)
def catalogs(monkeypatch, root):
    """Hold what detectron2 registers when it is imported; what a test changes is undone."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        others = {name: value for name, value in catalog.data.items() if name not in ALL}
        monkeypatch.setattr(catalog, "data", others)
    monkeypatch.setattr(builtin, "_root", str(root))
    builtin.register_all_pascal_voc(str(root))


@pytest.fixture
def root(tmp_path):
    """$DETECTRON2_DATASETS, as conftest.py sets it."""
    return tmp_path / "datasets"


def write(folder, split="test"):
    """Three images, the second with a difficult dog; the folder."""
    one, two = [("dog", 11, 6, 30, 20), ("person", 1.5, 2, 9, 9)], [("cat", 1, 1, 60, 40)]
    write_voc(folder, {"1": one, "2": two, "3": []}, split)
    xml = folder / "Annotations" / "2.xml"
    hard = OBJECT.format("dog", 5, 5, 9, 9).replace("<difficult>0", "<difficult>1")
    xml.write_text(xml.read_text().replace("</annotation>", f"{hard}</annotation>"))
    return folder


def folders():
    return {name: MetadataCatalog.get(name).dirname for name in ALL}


def loaders():
    return {name: DatasetCatalog[name] for name in ALL}


@pytest.mark.parametrize("year", [2007, 2012])
def test_devkit_is_what_detectron2_reads(root, year):
    """Metadata differs in the folder alone. Both kinds of configs find it."""
    before = {name: MetadataCatalog.get(name).as_dict() for name in ALL}
    folder = write(root / "VOCdevkit" / f"VOC{year}", "val")
    load_config("")
    name = f"voc_{year}_val"
    records = DatasetCatalog.get(name)
    assert records == load_voc_instances(str(folder), "val", CLASS_NAMES)
    assert [len(record["annotations"]) for record in records] == [2, 2, 0]  # difficult ones too
    check_dataset(name, ("MODEL.RETINANET.NUM_CLASSES", 20), check_images=3)
    for name in ALL:
        expected = {**before[name], "dirname": str(folder)} if name in NAMES[year] else before[name]
        assert MetadataCatalog.get(name).as_dict() == expected


def test_detectron2s_layout_comes_first_and_is_left_alone(root):
    before = loaders()
    write(root / "VOC2007")
    write(root / "VOCdevkit" / "VOC2007")
    for _ in range(2):
        register_builtin_voc()
        assert loaders() == before
        assert folders()["voc_2007_test"] == str(root / "VOC2007")


def test_follows_the_environment_and_the_folders(root, tmp_path, monkeypatch):
    write(root / "VOCdevkit" / "VOC2007")
    register_builtin_voc()
    other = tmp_path / "other"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(other))
    folder = write(other / "VOC2007")
    register_builtin_voc()
    assert folders() == {name: str(other / f"VOC{name[4:8]}") for name in ALL}
    assert DatasetCatalog.get("voc_2007_test")[0]["file_name"] == str(folder / "JPEGImages" / "1.jpg")
    (other / "VOCdevkit").mkdir()
    folder.rename(other / "VOCdevkit" / "VOC2007")
    register_builtin_voc()
    assert folders()["voc_2007_test"] == str(other / "VOCdevkit" / "VOC2007")


def test_users_own_names_stay(root, tmp_path):
    write(root / "VOCdevkit" / "VOC2007")
    own = write(tmp_path / "own")
    for split in ("test", "val", "train"):
        DatasetCatalog.remove(f"voc_2007_{split}")
        MetadataCatalog.remove(f"voc_2007_{split}")
    register_pascal_voc("voc_2007_test", str(own), "test", 2007, ["dog", "cat", "person"])
    DatasetCatalog.register("voc_2007_val", lambda: ["mine"])  # and "train" stays removed
    register_builtin_voc()
    assert MetadataCatalog.get("voc_2007_test").dirname == str(own)
    assert len(DatasetCatalog.get("voc_2007_test")) == 3
    assert DatasetCatalog.get("voc_2007_val") == ["mine"]
    assert "voc_2007_train" not in DatasetCatalog.list()
    assert MetadataCatalog.get("voc_2007_trainval").dirname == str(root / "VOCdevkit" / "VOC2007")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_missing_dataset_names_both_places(root, tmp_path, monkeypatch, elsewhere):
    if elsewhere:  # than where detectron2 was imported
        root = tmp_path / "elsewhere"
        monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    write(root / "VOC2012")
    register_builtin_voc()
    with pytest.raises(FileNotFoundError) as caught:
        check_dataset("voc_2007_test")
    places = [str(root / "VOC2007"), str(root / "VOCdevkit" / "VOC2007")]
    for text in ("voc_2007_test", f"looked for in {places}", "['VOC2012']", "distill-d2 init"):
        assert text in str(caught.value)


def test_lazy_configs_find_the_devkit(root, tmp_path):
    folder, file = write(root / "VOCdevkit" / "VOC2007"), tmp_path / "config.py"
    text = "from detectron2.model_zoo import get_config\ntrain = get_config('common/train.py').train\n"
    text += f"train.update(output_dir='{tmp_path / 'output'}', max_iter=1, device='cpu')\n"
    file.write_text(
        text + "model = optimizer = lr_multiplier = dict()\ndataloader = dict(train=dict())\n"
    )
    args = argument_parser().parse_args(["--num-gpus", "0", "--config-file", str(file)])
    lazy.setup(args, distill=False)
    assert MetadataCatalog.get("voc_2007_test").dirname == str(folder)
