"""Sets, flags and weights that cannot be used: one sentence that names file and entry, status 2, nothing encoded or written."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from engine import eval as command
from engine.core.errors import BadInput
from engine.data.annotated import clips
from engine.data.sets import scenes
from engine.evals import judging
from engine.model import vit, weights

MODEL = "random:vit_micro_patch8_32"
KEPT = {"train": 8, "val": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A few of the embedded scenes and clips in the layouts of COCO, VOC, ADE20K, DAVIS and image folders."""
    root, source = tmp_path_factory.mktemp("sets"), scenes.write()
    for split, count in KEPT.items():
        file = source / "coco" / "annotations" / f"instances_{split}.json"
        found = json.loads(file.read_text())
        found["images"] = found["images"][:count]
        ids = {image["id"] for image in found["images"]}
        found["annotations"] = [each for each in found["annotations"] if each["image_id"] in ids]
        copy(file, root / "coco/annotations" / file.name).write_text(json.dumps(found))
        part = {"train": "training", "val": "validation"}[split]
        names = [image["file_name"].removesuffix(".jpg") for image in found["images"]]
        for name in names:
            image, mask = source / "voc/JPEGImages" / f"{name}.jpg", source / "voc/SegmentationClass" / f"{name}.png"
            for place in (f"coco/images/{split}", "voc/JPEGImages", f"ade/images/{part}", f"folder/{split}/one"):
                copy(image, root / place / image.name)
            for place in ("voc/SegmentationClass", "voc/SegmentationObject", f"ade/annotations/{part}"):
                copy(mask, root / place / mask.name)
            with Image.open(mask) as indices:  # in ADE20K, what does not count is 0
                indices.point(lambda index: index % 255).save(root / f"ade/annotations/{part}" / mask.name)
            copy(source / "voc/Annotations" / f"{name}.xml", root / "voc/Annotations" / f"{name}.xml")
        (root / f"folder/{split}/two").mkdir()
        shutil.move(root / f"folder/{split}/one/{names[0]}.jpg", root / f"folder/{split}/two")
        for list_ in ("Main", "Segmentation"):
            there = root / "voc/ImageSets" / list_
            there.mkdir(parents=True, exist_ok=True)
            (there / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for category in scenes.CATEGORIES:
            copy(*(at / "voc/ImageSets/Main" / f"{category}_{split}.txt" for at in (source, root)))
    videos = clips.write()
    first = (videos / "ImageSets/2017/val.txt").read_text().split()[0]
    for kind in ("JPEGImages", "Annotations"):
        shutil.copytree(videos / kind / "480p" / first, root / "davis" / kind / "480p" / first)
    copy(videos / "ImageSets/2017/val.txt", root / "davis/ImageSets/2017/val.txt").write_text(f"{first}\n")
    return root


def copy(source: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(source, to))


@pytest.fixture
def sets(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "sets"))


@pytest.fixture(autouse=True)
def never_encoded(monkeypatch):
    """The images that a ViT was given."""
    seen, embed = [], vit.VisionTransformer.embed
    monkeypatch.setattr(
        vit.VisionTransformer, "embed", lambda model, *given: seen.append(given) or embed(model, *given)
    )
    return seen


def refused(arguments: list[str], out: Path, capsys) -> str:
    """The sentence."""
    assert command.main([*arguments, "--out", str(out / "out"), "--threads", "1", "--no-cache"]) == 2
    shown, said = capsys.readouterr()
    assert said.startswith("error: ") and said.count("\n") == 1 and not shown and not (out / "out").exists()
    return said


def of(sets: Path, name: str) -> list[str]:
    if name == "folder":
        return ["--data", str(sets / name), "--knn.k", "1"]
    kinds = {"coco": "coco", "voc": "voc", "ade": "ade20k", "davis": "davis"}
    return ["--video" if name == "davis" else "--objects", f"{kinds[name]}:{sets / name}"]


def first(folder: Path, files: str) -> Path:
    return min(folder.rglob(files))


def in_json(change):
    """Damage to the validation file of COCO's layout."""

    def damage(sets: Path) -> None:
        file = sets / "coco/annotations/instances_val.json"
        found = json.loads(file.read_text())
        change(found)
        file.write_text(json.dumps(found))

    return damage


def in_xml(sets: Path) -> None:
    file = first(sets / "voc/Annotations", "*.xml")
    root = ElementTree.fromstring(file.read_text())
    root.find("object/bndbox/xmax").text = "140"
    file.write_text(ElementTree.tostring(root, encoding="unicode"))


def smaller(folder: str):
    """Halve the last mask below a folder."""

    def damage(sets: Path) -> None:
        path = max((sets / folder).rglob("*.png"))
        with Image.open(path) as mask:
            mask.resize((mask.width // 2, mask.height // 2), Image.Resampling.NEAREST).save(path)

    return damage


def repainted(folder: str, value: int):
    """Give a value to the first pixel of the first mask."""

    def damage(sets: Path) -> None:
        path = first(sets / folder, "*.png")
        with Image.open(path) as mask:
            mask.putpixel((0, 0), value)
            mask.save(path)

    return damage


def coloured(folder: str):
    def damage(sets: Path) -> None:
        path = max((sets / folder).rglob("*.png"))
        with Image.open(path) as mask:
            mask.convert("RGB").save(path)

    return damage


def cut(folder: str):
    def damage(sets: Path) -> None:
        path = first(sets / folder, "*.png")
        path.write_bytes(path.read_bytes()[:-200])

    return damage


def emptied(file: str):
    return lambda sets: (sets / file).write_text("")


def spoilt(folder: str):
    def damage(sets: Path) -> None:
        for path in (sets / folder).rglob("*.jpg"):
            path.write_bytes(b"no image")

    return damage


def without(place: str, files: str = ""):
    """Remove a folder, or the first of some files in it."""
    return lambda sets: first(sets / place, files).unlink() if files else shutil.rmtree(sets / place)


SETS = {
    "COCO without annotations": (
        without("coco/annotations"), "multilabel", "coco",
        r"/coco is not laid out as COCO: it needs annotations/instances_train.json and images/train/",
    ),
    "COCO without its validation file": (
        without("coco/annotations", "instances_val.json"), "detection", "coco", r"it needs annotations/instances_val.json",
    ),
    "VOC without lists": (without("voc/ImageSets"), "multilabel", "voc", r"/ImageSets/Main/train.txt is missing"),
    "VOC without masks": (without("voc/SegmentationClass"), "segment_patches", "voc", r"SegmentationClass/\d+.png is missing"),
    "VOC without boxes": (without("voc/Annotations", "*.xml"), "multilabel", "voc", r"Annotations/000001.xml cannot be read"),
    "DAVIS without masks": (without("davis/Annotations"), "propagation", "davis", r"/davis is not laid out as DAVIS-2017"),
    "DAVIS with a mask missing": (
        without("davis/Annotations", "*.png"), "propagation", "davis", r"00000.png is missing: every frame of .* needs a mask",
    ),
    "ADE20K without masks": (
        without("ade/annotations"), "segment_linear", "ade", r"/ade is not laid out .* annotations/training",
    ),
    "a mask of ADE20K missing": (
        without("ade/annotations/training", "*.png"), "segment_linear", "ade", r"the mask .*training/000001.png is missing",
    ),
    "a box outside its image, COCO": (
        in_json(lambda found: found["annotations"][2].update(bbox=[100, 100, 40, 10])), "detection", "coco",
        r"annotation \d+ of .*/instances_val.json has the box \(100, 100, 140, 110\) outside its image of 128x128 pixels",
    ),
    "a box outside its image, VOC": (
        in_xml, "multilabel", "voc", r"object 1 of .*/000001.xml has the box .* outside its image of 128x128 pixels",
    ),
    "run lengths of another size": (
        in_json(lambda found: found["annotations"][1]["segmentation"].update(size=[64, 64])), "prompt", "coco",
        r"annotation \d+ of .*/instances_val.json has a mask of size \[64, 64\], but its image is \[128, 128\]",
    ),
    "run lengths that do not fill the image": (
        in_json(lambda found: found["annotations"][1]["segmentation"].update(counts=[5, 5])), "detection", "coco",
        r"annotation \d+ of .*/instances_val.json has run lengths that do not fill its image of 128x128 pixels",
    ),
    "a VOC mask of another size": (
        smaller("voc/SegmentationClass"), "segment_upernet", "voc",
        r"SegmentationClass/000404.png has 64x64 pixels, but its image has 128x128",
    ),
    "a mask of VOC objects of another size": (
        smaller("voc/SegmentationObject"), "detection", "voc",
        r"SegmentationObject/000404.png has 64x64 pixels, but its image has 128x128",
    ),
    "an ADE20K mask of another size": (
        smaller("ade/annotations"), "segment_linear", "ade", r"validation/000404.png has 64x64 pixels, but its image has 128x128",
    ),
    "a DAVIS mask of another size": (
        smaller("davis/Annotations"), "propagation", "davis", r"/00015.png has \d+x\d+ pixels, but its image has \d+x\d+",
    ),
    "no masks at all": (
        in_json(lambda found: [each.pop("segmentation") for each in found["annotations"]]), "prompt", "coco",
        r"annotation \d+ of .*/instances_val.json has no segmentation, so there is no mask",
    ),
    "no JSON": (
        lambda sets: (sets / "coco/annotations/instances_val.json").write_text('{"images": ['), "multilabel", "coco",
        r"/instances_val.json is no JSON that can be read",
    ),
    "JSON of something else": (
        lambda sets: (sets / "coco/annotations/instances_val.json").write_text("[]"), "multilabel", "coco",
        r"/instances_val.json has no list 'images'",
    ),
    "an image of COCO missing": (
        without("coco/images/val", "*.jpg"), "multilabel", "coco", r"/instances_val.json lists 000401.jpg, which is missing",
    ),
    "an image of VOC missing": (
        without("voc/JPEGImages", "*.jpg"), "segment_patches", "voc", r"train.txt lists JPEGImages/000001.jpg, which is missing",
    ),
    "an image of ADE20K missing": (
        without("ade/images", "*.jpg"), "segment_patches", "ade", r"the mask .*000001.png has no image in ",
    ),
    "a frame missing": (
        without("davis/JPEGImages", "*.jpg"), "propagation", "davis", r"00000.jpg is missing: every frame of ",
    ),
    "unreadable images": (
        spoilt("coco/images/val"), "multilabel", "coco", r"4 of 4 images are bad, above the limit of 0.001 \(000401.jpg: ",
    ),
    "unreadable frames": (spoilt("davis/JPEGImages"), "propagation", "davis", r"images are bad, above the limit"),
    "unreadable images with classes": (
        spoilt("folder/val"), "knn", "folder", r"4 of 4 images are bad, above the limit of 0.001 \(val/one/000402.jpg: ",
    ),
    "no test image with a class": (
        lambda sets: [path.unlink() for path in (sets / "folder/val").rglob("*.jpg")], "knn", "folder", r"folder/val",
    ),
    "no validation folder": (without("folder/val"), "knn", "folder", r"/folder has no val split: it needs a folder val/"),
    "a class that training lacks": (
        lambda sets: (sets / "folder/train/two").rename(sets / "folder/train/three"), "knn", "folder", r"two",
    ),
    "a pixel of no class": (
        repainted("ade/annotations/training", 200), "segment_patches", "ade",
        r"training/000001.png has the value 200, which stands for no class",
    ),
    "a pixel of no category": (
        repainted("voc/SegmentationClass", 99), "segment_patches", "voc",
        r"SegmentationClass/000001.png has the index 99, but there are 10 categories",
    ),
    "a mask in colours": (
        coloured("voc/SegmentationClass"), "segment_lowshot", "voc",
        r"SegmentationClass/000404.png has pixels of type RGB, where indices belong",
    ),
    "a mask cut off": (
        cut("voc/SegmentationClass"), "segment_patches", "voc", r"the mask .*SegmentationClass/000001.png cannot be read",
    ),
    "no test image, COCO": (
        in_json(lambda found: (found["images"].clear(), found["annotations"].clear())), "multilabel", "coco",
        r"/instances_val.json lists no images",
    ),
    "no test image, VOC": (
        emptied("voc/ImageSets/Segmentation/val.txt"), "segment_linear", "voc", r"Segmentation/val.txt lists no images",
    ),
    "no test image, ADE20K": (
        lambda sets: [path.unlink() for path in (sets / "ade").rglob("validation/*")], "segment_linear", "ade",
        r"ade/images/validation has no images",
    ),
    "no video": (emptied("davis/ImageSets/2017/val.txt"), "propagation", "davis", r"2017/val.txt lists no images"),
    "no object": (
        in_json(lambda found: found["annotations"].clear()), "detection", "coco", r"no object of the test set counts",
    ),
    "no object to prompt": (
        in_json(lambda found: found["annotations"].clear()), "prompt", "coco", r"the test set has no object that counts",
    ),
    "other categories in the validation file": (
        in_json(lambda found: found["categories"].append({"id": 99, "name": "bird"})), "multilabel", "coco",
        r"/coco: the training and the validation file have different categories",
    ),
    "a category twice": (
        in_json(lambda found: found["categories"].append(found["categories"][0])), "multilabel", "coco",
        r"category 1 of .*/instances_val.json is there twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SETS)
def test_damaged_sets_get_one_sentence(sets, tmp_path, capsys, never_encoded, case):
    damage, protocol, source, sentence = SETS[case]
    damage(sets)
    said = refused(["--weights", MODEL, "--protocol", protocol, *of(sets, source)], tmp_path, capsys)
    assert re.search(sentence, said), said
    assert not never_encoded


def test_damage_that_shows_late_gets_one_sentence_too(sets, tmp_path, capsys):
    mask = max((sets / "voc/SegmentationClass").iterdir())
    mask.write_bytes(mask.read_bytes()[:-200])
    small = ["--segment_patches.size", "32", "--segment_patches.k", "1"]
    said = refused(["--weights", MODEL, "--protocol", "segment_patches", *small, *of(sets, "voc")], tmp_path, capsys)
    assert re.search(r"the mask .*SegmentationClass/000404.png cannot be read", said)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["multilabel", "--objects", "coc:ROOT/coco"], "'coc:ROOT/coco' is no annotated set (did you mean coco:DIR?)"),
        (["multilabel", "--objects", "scene"], "'scene' is no annotated set (did you mean scenes?)"),
        (
            ["propagation", "--video", "davi:ROOT/davis"],
            "'davi:ROOT/davis' is no annotated set (did you mean davis:DIR?)",
        ),
        (["propagation", "--video", "davis:/none"], "/none after davis: is no folder"),
        (["detection", "--objects", "coco:"], "nothing after coco: is no folder"),
        (
            ["multilabel", "--objects", "ade20k:ROOT/ade"],
            "ade20k:ROOT/ade has no objects; give scenes, coco:DIR",
        ),
        (
            ["detection", "--objects", "davis:ROOT/davis"],
            "davis:ROOT/davis has no masks; give scenes, ",
        ),
        (["propagation", "--video", "coco:ROOT/coco"], "coco:ROOT/coco has no video; give clips, davis:DIR."),
        (
            ["knn", "--data", "coco:ROOT/coco"],
            "coco:ROOT/coco is no folder: give a folder of images or of tar shards, ",
        ),
        (["knn", "--data", "ROOT/folder"], "knn k = 20 is more than the 8 training images"),
        (["multilabel", "--objects-size", "100"], "inputs of 100x100 pixels are no multiple of the patch size 8"),
        (
            ["multilabel_finetune", "--objects-size", "100"],
            "inputs of 100x100 pixels are no multiple of the patch size 8",
        ),
        (["multilabel_lowshot"], "error: multilabel_lowshot: class 1 is shown by 1 of 8 images, which is less than 2"),
        (["multilabel", "--objects-size", "0"], "--objects-size takes one positive number"),
        (["knn", "--image-size", "30"], "is not a multiple of the patch size 8"),
        (["prompt", "--prompt.inputs", "crop:100"], "input size 100 is not a multiple of the patch size 8"),
        (["segment_patches", "--segment_patches.size", "100"], "size = 100 is no multiple of the patch size 8"),
        (["segment_linear", "--segment_linear.size", "100"], "size = 100 must be a multiple of the patch size 8"),
        (["propagation", "--propagation.size", "100"], "size = 100 is not a multiple of the patch size 8"),
        (["detection", "--detection.size", "100"], "size 100 is not a multiple of the patch size 8"),
        (
            ["attentive", "--attentive.form", "ep", "--attentive.queries", "7"],
            "queries = 7 must divide the encoder's width, 128",
        ),
        (["finetune", "--finetune.blocks", "7"], "has 6 blocks, so the last 7 cannot be trained"),
        (["knn", "--compare", MODEL], "--weights names the same weights twice"),
        (["knn", "--seeds", "0"], "--seeds is 0; it must be 1 or more"),
        (["knn", "--compare", "raw", "--model", "vit_micro_patch8_32"], "--model belongs to a file"),
    ],
)
def test_flags_that_do_not_fit_get_one_sentence(sets, tmp_path, capsys, never_encoded, arguments, sentence):
    arguments = [argument.replace("ROOT", str(sets)) for argument in arguments]
    if not {"--objects", "--video"} & set(arguments):
        arguments += [*of(sets, "coco"), *of(sets, "davis")]
    said = refused(["--weights", MODEL, "--protocol", *arguments], tmp_path, capsys)
    assert sentence.replace("ROOT", str(sets)) in said
    assert not never_encoded


@pytest.mark.parametrize("protocol", ["attentive", "detection", "finetune", "prompt", "propagation", "segment_linear"])
def test_pixels_have_no_model(sets, tmp_path, capsys, protocol):
    said = refused(["--weights", "raw", "--protocol", "knn", protocol], tmp_path, capsys)
    assert "raw pixels (32x32 pixels) have no patch" in said and "give the weights of a ViT" in said


def test_one_set_of_weights_is_not_compared(tmp_path, capsys):
    assert "--compare has nothing to put raw beside" in refused(["--compare", "raw"], tmp_path, capsys)


def test_weights_that_are_not_finite_are_refused(tmp_path, capsys, never_encoded):
    model = vit.create("vit_micro_patch8_32")
    with torch.no_grad():
        model.blocks[3].mlp.fc1.bias[5] = float("nan")
    weights.export(model, tmp_path / "broken")
    said = refused(["--weights", str(tmp_path / "broken"), "--protocol", "all"], tmp_path, capsys)
    assert "1 of them (blocks.3.mlp.fc1.bias has values that are not finite)" in said
    assert not never_encoded


def test_an_encoder_that_is_not_finite_is_refused_as_files_are(tmp_path):
    """One that no file was read for: of a run that has just ended."""
    model = vit.create("vit_micro_patch8_32")
    with torch.no_grad():
        model.norm.weight[3] = float("inf")
    with pytest.raises(BadInput, match=r"mine contain NaN or infinity in norm\.weight"):
        judging._check_finite(SimpleNamespace(name="mine", encoder=SimpleNamespace(model=model)))


@pytest.fixture
def relative(tmp_path):
    """An exported model whose positions are those of one size."""
    weights.export(vit.create("vit_micro_patch8_32", positions="relative"), tmp_path / "relative")
    return str(tmp_path / "relative")


@pytest.mark.parametrize(
    "protocol",
    [
        "multilabel",
        "multilabel_lowshot",
        "prompt",
        "similarity",
        "segment_patches",
        "segment_lowshot",
        "segment_linear",
        "segment_upernet",
        "propagation",
    ],
)
def test_models_of_one_size_are_refused_before_other_protocols_run(
    relative, sets, tmp_path, capsys, never_encoded, protocol
):
    arguments = [
        "--objects-size",
        "64",
        "--multilabel_lowshot.positives",
        "1",
        "--multilabel_lowshot.percents",
        "50",
        *of(sets, "coco"),
        *of(sets, "davis"),
    ]
    said = refused(["--weights", relative, "--protocol", "knn", protocol, *arguments], tmp_path, capsys)
    assert "relative has relative positions, for inputs of 32x32 pixels only, not " in said
    assert not never_encoded


@pytest.mark.parametrize(
    ("protocol", "flags", "sentence"),
    [
        ("attentive", [], "--aspect keep is for pooled features, and protocol attentive reads another thing: tokens."),
        ("knn", [], "relative has relative positions, for one shape of images only: leave out --aspect keep."),
        ("knn", ["--squeeze"], "--squeeze gives all images one shape, and --aspect keep leaves them theirs"),
    ],
)
def test_images_of_their_own_aspect_are_refused_where_they_cannot_be_had(
    relative, tmp_path, capsys, never_encoded, protocol, flags, sentence
):
    arguments = ["--weights", relative, "--protocol", protocol, "--aspect", "keep", *flags]
    assert sentence in refused(arguments, tmp_path, capsys)
    assert not never_encoded


def test_a_category_without_an_object_is_judged_around(sets, tmp_path):
    for split in KEPT:
        file = sets / f"coco/annotations/instances_{split}.json"
        found = json.loads(file.read_text())
        found["categories"].append({"id": 99, "name": "bird"})
        file.write_text(json.dumps(found))
    arguments = ["--weights", MODEL, "--threads", "1", "--no-cache", *of(sets, "coco"), "--out", str(tmp_path / "out")]
    small = ["--segment_patches.k", "1", "--segment_patches.size", "32", "--multilabel.costs", "1"]
    small += ["--detection.epochs", "1", "--detection.size", "32", "--objects-size", "32"]
    assert command.main([*arguments, "--protocol", "multilabel", "segment_patches", "detection", *small]) == 0
    found = {each["protocol"]: each for each in json.loads((tmp_path / "out/results.json").read_text())["results"]}
    counts = found["multilabel"]["counts"]
    assert counts["classes"] + counts["classes left out"] == 11 and counts["classes left out"] >= 1
    assert found["segment_patches"]["details"]["IoU by class"]["k-NN"]["bird"] is None
    assert found["detection"]["details"]["box AP by category"]["bird"] is None
