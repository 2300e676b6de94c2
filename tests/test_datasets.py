import sys
from types import SimpleNamespace

import numpy as np
import pytest

from advreg import datasets


class TestDigits:
    def test_split(self):
        digits = datasets.load("digits")
        assert digits.x_train.shape == (1297, 8, 8, 1)
        assert digits.x_test.shape == (500, 8, 8, 1)
        assert digits.y_train.shape == (1297,)
        assert digits.y_test.shape == (500,)
        assert digits.num_classes == 10
        assert digits.class_names == tuple("0123456789")

    def test_values(self):
        digits = datasets.load("digits")
        for images in (digits.x_train, digits.x_test):
            assert images.dtype == np.float32
            assert images.min() == 0.0
            assert images.max() == 1.0
        for labels in (digits.y_train, digits.y_test):
            assert np.issubdtype(labels.dtype, np.integer)
            assert set(labels) == set(range(10))

    def test_is_stratified(self):
        digits = datasets.load("digits")
        train = np.bincount(digits.y_train) / 1297
        test = np.bincount(digits.y_test) / 500
        np.testing.assert_allclose(test, train, atol=0.002)

    def test_is_every_image_once(self):
        from sklearn.datasets import load_digits

        def rows(images, labels):
            flat = images.reshape(len(images), -1)
            return sorted(map(tuple, np.column_stack([flat, labels]).tolist()))

        ours = datasets.load("digits")
        theirs = load_digits()
        assert rows(
            np.concatenate([ours.x_train, ours.x_test]) * 16,
            np.concatenate([ours.y_train, ours.y_test]),
        ) == rows(theirs.images, theirs.target)

    def test_is_the_same_every_time(self):
        first = datasets.load("digits")
        np.random.seed(1)
        second = datasets.load("digits")
        np.testing.assert_array_equal(first.x_train, second.x_train)
        np.testing.assert_array_equal(first.y_test, second.y_test)


class TestTFDS:
    @pytest.mark.slow
    def test_mnist(self, mnist_dir):
        mnist = datasets.load("mnist")
        assert mnist.x_train.shape == (60000, 28, 28, 1)
        assert mnist.x_test.shape == (10000, 28, 28, 1)
        assert mnist.x_train.dtype == np.float32
        assert mnist.x_train.min() == 0.0
        assert mnist.x_train.max() == 1.0
        np.testing.assert_allclose(mnist.x_train.mean(), 0.1307, atol=1e-4)
        assert np.bincount(mnist.y_test).tolist() == [
            *(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
        ]
        assert mnist.num_classes == 10
        assert mnist.class_names == tuple("0123456789")

    def test_unknown_name(self):
        pytest.importorskip("tensorflow_datasets")
        with pytest.raises(
            datasets.DatasetError, match=r"'mnits'.*Did you mean: mnist"
        ):
            datasets.load("mnits")

    def test_unknown_version(self, mnist_dir):
        with pytest.raises(datasets.DatasetError, match=r"'mnist:9\.9\.9'.*version"):
            datasets.load("mnist:9.9.9")

    def test_unknown_configuration(self, mnist_dir):
        with pytest.raises(datasets.DatasetError, match="'mnist/nothing'"):
            datasets.load("mnist/nothing")


class FakeBuilder:
    """A TFDS builder without data, for what cannot be downloaded in a test."""

    data_path = "/data/fake"

    def __init__(self, features, keys=("image", "label"), splits=(), error=None):
        self.info = SimpleNamespace(
            features=features, supervised_keys=keys, splits=dict.fromkeys(splits)
        )
        self.error = error
        self.read = []

    def download_and_prepare(self):
        if self.error is not None:
            raise self.error

    def as_dataset(self, split, as_supervised, batch_size):
        assert as_supervised
        assert batch_size == -1
        self.read.append(split)
        return (
            np.full((2, 4, 4, 3), 51, "uint8"),
            np.array([0, 1]),
        )


class TestFakes:
    @pytest.fixture
    def tfds(self):
        return pytest.importorskip("tensorflow_datasets")

    @pytest.fixture
    def load(self, tfds, monkeypatch):
        def load(builder):
            monkeypatch.setattr(tfds, "builder", lambda name: builder)
            monkeypatch.setattr(tfds, "as_numpy", lambda data: data)
            return datasets.load("fake")

        return load

    def features(self, tfds, shape=(4, 4, 3), **replaced):
        return {
            "image": tfds.features.Image(shape=shape),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            **replaced,
        }

    @pytest.mark.parametrize(
        ("splits", "read"),
        [
            (["train", "test", "validation"], ["train", "test"]),
            (["validation", "train"], ["train", "validation"]),
        ],
    )
    def test_splits(self, tfds, load, splits, read):
        builder = FakeBuilder(self.features(tfds), splits=splits)
        data = load(builder)
        assert builder.read == read
        assert data.class_names == ("cat", "dog")
        assert data.num_classes == 2
        np.testing.assert_array_equal(data.x_test, np.full((2, 4, 4, 3), 0.2, "f"))
        assert data.x_test.dtype == np.float32

    @pytest.mark.parametrize("splits", [["train"], ["test", "validation"], []])
    def test_missing_split(self, tfds, load, splits):
        with pytest.raises(datasets.DatasetError, match="'fake' must have a split"):
            load(FakeBuilder(self.features(tfds), splits=splits))

    def test_cannot_be_downloaded(self, tfds, load):
        error = ConnectionError("no\nnetwork")
        with pytest.raises(datasets.DatasetError) as raised:
            load(FakeBuilder(self.features(tfds), error=error))
        message = str(raised.value)
        for part in ("'fake'", "/data/fake", "TFDS_DATA_DIR", "no network"):
            assert part in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        "kind", ["text", "ragged", "alpha", "float", "number", "pair", "nested", "none"]
    )
    def test_not_image_classification(self, tfds, load, kind):
        f = tfds.features
        keys = {
            "pair": ("image", "label", "label"),
            "nested": (("image", "image"), "label"),
            "none": None,
        }.get(kind, ("image", "label"))
        features = {
            "text": lambda: self.features(tfds, image=f.Text()),
            "ragged": lambda: self.features(tfds, (None, None, 3)),
            "alpha": lambda: self.features(tfds, (4, 4, 4)),
            "float": lambda: self.features(
                tfds, image=f.Image(shape=(4, 4, 1), dtype=np.float32)
            ),
            "number": lambda: self.features(tfds, label=f.Scalar(np.int64)),
        }.get(kind, lambda: self.features(tfds))()
        builder = FakeBuilder(
            features, keys, error=AssertionError("checks come before the download")
        )
        with pytest.raises(datasets.DatasetError) as raised:
            load(builder)
        message = str(raised.value)
        assert message.startswith("The dataset 'fake' is not classification of images")
        assert str(keys) in message


@pytest.mark.parametrize(
    ("name", "module"),
    [("digits", "sklearn.datasets"), ("mnist", "tensorflow_datasets")],
)
def test_missing_extra(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'advreg\[demo\]'"):
        datasets.load(name)
