"The published data sets in full. Needs `VAE_DIFFUSION_DATA`; the page `nbs/method/01_data.ipynb` checks everything that does not."
import gzip, os
from pathlib import Path

import pytest, torch

from vae_diffusion import data, levels
from vae_diffusion.core.errors import ProjectError

DATA = os.environ.get("VAE_DIFFUSION_DATA")
pytestmark = pytest.mark.data
published = [name for name in data.DATASETS if name != "digits"]
expected = { # train and test images, shape, levels, test images that are also training images
    "binary_mnist": (60_000, 10_000, (1, 28, 28), 2, 9),
    "fashion_mnist": (60_000, 10_000, (1, 28, 28), 256, 0),
    "cifar10": (50_000, 10_000, (3, 32, 32), 256, 0)}


@pytest.fixture(scope="module")
def loaded():
    return {name: data.load(name) for name in published}


@pytest.mark.parametrize("name", published)
def test_sizes(loaded, name):
    d = loaded[name]
    assert (len(d.train), len(d.test), d.shape, d.levels) == expected[name][:4]
    assert d.train.max() == d.test.max() == d.levels-1 and d.train.min() == 0


def test_labels(loaded):
    for name, each in ("fashion_mnist", 6000), ("cifar10", 5000):
        assert loaded[name].train_labels.bincount().tolist() == [each]*10
        assert loaded[name].test_labels.bincount().tolist() == [1000]*10
    assert loaded["binary_mnist"].train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert loaded["binary_mnist"].test_labels[:5].tolist() == [7, 2, 1, 0, 4]


def test_means_are_those_in_common_use(loaded):
    "The channel means that many programs normalise with; they would show a wrong plane order."
    common = {"fashion_mnist": [0.2860], "cifar10": [0.4914, 0.4822, 0.4465]}
    for name, mean in common.items():
        assert loaded[name].train.numpy().mean((0, 2, 3))/255 == pytest.approx(mean, abs=6e-5)


def test_binary_mnist_is_the_threshold(loaded):
    raw = gzip.decompress((Path(DATA)/"mnist"/"t10k-images-idx3-ubyte.gz").read_bytes())
    grey = torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8).reshape(-1, 1, 28, 28)
    torch.testing.assert_close(loaded["binary_mnist"].test, levels.to_levels(levels.to_unit(grey, 256), 2))


@pytest.mark.parametrize("name", published)
def test_images_in_both_parts(loaded, name):
    d = loaded[name]
    train = {x.tobytes() for x in d.train.numpy()}
    both = [i for i, x in enumerate(d.test.numpy()) if x.tobytes() in train]
    assert len(both) == expected[name][4]
    assert (d.test_labels[both] == 1).all() # the nine of Binary MNIST are strokes: the digit 1


layouts = [("binary_mnist", "mnist", "MNIST"), ("fashion_mnist", "fashion-mnist", "FashionMNIST")]


@pytest.mark.parametrize("name, folder, theirs", layouts)
def test_other_layouts(loaded, tmp_path, name, folder, theirs):
    "torchvision's, where the files are uncompressed, and the folder of the data set itself."
    (raw := tmp_path/theirs/"raw").mkdir(parents=True)
    for file in data.idx_files: (raw/Path(file).stem).write_bytes(gzip.decompress((Path(DATA)/folder/file).read_bytes()))
    for here in tmp_path, tmp_path/theirs, raw, Path(DATA)/folder:
        assert torch.equal(data.load(name, here).train, loaded[name].train)


def test_the_folder_of_another_data_set():
    for name, said in ("binary_mnist", "found MD5 f4a8712d7a061bf5bd6d2ca38dc4d50a"), ("cifar10", "fashion-mnist holds t10k"):
        with pytest.raises(ProjectError, match=said): data.load(name, Path(DATA)/"fashion-mnist")


@pytest.fixture
def copy(tmp_path, monkeypatch):
    "A copy of the data folder made of links, in which files can be replaced. Whoever downloads fails."
    monkeypatch.setattr("vae_diffusion.core.published.download", lambda *args: pytest.fail("tried to download"))
    for source in (data.DATASETS[name].source for name in published):
        (tmp_path/source.folder).mkdir()
        for file in source.files: (tmp_path/source.folder/file).symlink_to(Path(DATA).absolute()/source.folder/file)
    return tmp_path


def replace(path, content):
    path.unlink()
    if content is not None: path.write_bytes(content)


def flip(content, at):
    return content[:at]+bytes([content[at]^1])+content[at+1:]


damage = {
    "flipped": (lambda b: flip(b, len(b)//2), "found"),
    "truncated": (lambda b: b[:len(b)//2], "found"),
    "longer": (lambda b: b+b"\1", "found"),
    "empty": (lambda b: b"", "found"),
    "missing": (lambda b: None, "no such file")}


@pytest.mark.parametrize("kind", damage)
@pytest.mark.parametrize("name", published)
def test_damaged_file(copy, name, kind):
    source, (change, found) = data.DATASETS[name].source, damage[kind]
    path = copy/source.folder/list(source.files)[-1]
    replace(path, change(path.read_bytes()))
    with pytest.raises(ProjectError) as e: data.load(name, copy)
    for part in (str(path), source.files[path.name][1], found, "Put the published file there"): assert part in str(e.value)


@pytest.mark.parametrize("file", data.idx_files)
def test_one_bit_in_an_intact_container(copy, file):
    path = copy/"mnist"/file
    replace(path, gzip.compress(flip(gzip.decompress(path.read_bytes()), 5000), 1))
    with pytest.raises(ProjectError, match=f"{file}: expected .* found MD5"): data.load("binary_mnist", copy)


def test_one_data_set_in_the_place_of_another(copy):
    replace(copy/"mnist"/data.idx_files[0], (copy/"fashion-mnist"/data.idx_files[0]).read_bytes())
    with pytest.raises(ProjectError, match="found MD5 f4a8712d7a061bf5bd6d2ca38dc4d50a"): data.load("binary_mnist", copy)


def test_environment_variable_is_not_added_to(copy, monkeypatch):
    monkeypatch.setenv("VAE_DIFFUSION_DATA", str(copy/"elsewhere"))
    with pytest.raises(ProjectError, match="no such file"): data.load("cifar10")
    assert not (copy/"elsewhere").exists()
