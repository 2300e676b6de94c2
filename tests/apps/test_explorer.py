import io
import struct
import zlib

import keras
import numpy as np
import pytest
from keras import layers

from advreg import AdversarialRegularization
from advreg.apps import explorer
from advreg.apps.explorer import pictures, view
from advreg.backend.tensorflow.functions import functions_of
from advreg.config.norms import NormType
from advreg.datasets import DatasetError, ImageDataset

image_module = pytest.importorskip("PIL.Image", reason="needs the extra app")

WEIGHTS = np.array([[3.0, -2.0], [1.0, -4.0]], "float32")
SHAPE = (2, 2, 1)
PIXELS = np.array([[0.5, 0.4], [0.95, 0.3]], "float32")[..., None]


def linear(weights=WEIGHTS, outputs="logits", shape=SHAPE, **scale):
    """A classifier of two classes whose logits are 0 and the weighted sum of pixels."""
    columns = weights.reshape(-1, 1)
    if outputs != "sigmoid":
        columns = np.concatenate([0 * columns, columns], axis=1)
    activation = None if outputs == "logits" else outputs
    model = keras.Sequential([keras.Input(shape), layers.Flatten()])
    if scale:
        model.add(layers.Rescaling(**scale))
    model.add(layers.Dense(columns.shape[1], activation, use_bias=False))
    model.layers[-1].set_weights([columns])
    return model


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, "float64")))


def explore(model, attack="FGSM", norm="infinity", epsilon=0.1, label=None, **options):
    sides = explorer.SideBySide({"one": model}, SHAPE, **options)
    return sides.explore(PIXELS, attack, norm, epsilon, label)["one"]


@pytest.mark.parametrize(
    ("scale", "pixel_range"),
    [
        ({}, (0.0, 1.0)),
        ({"scale": 1 / 255}, (0.0, 255.0)),
        ({"scale": 0.5, "offset": 0.5}, (-1.0, 1.0)),
    ],
)
@pytest.mark.parametrize("label", [0, 1])
def test_fgsm_of_a_linear_model(scale, pixel_range, label):
    width = pixel_range[1] - pixel_range[0]
    side = explore(
        linear(**scale), epsilon=0.1 * width, label=label, pixel_range=pixel_range
    )
    sign = np.sign(WEIGHTS)[..., None] * (1 if label == 0 else -1)
    expected = np.clip(PIXELS + 0.1 * sign, 0, 1)
    np.testing.assert_allclose(side.perturbed, expected, atol=1e-6)
    np.testing.assert_allclose(side.perturbation, expected - PIXELS, atol=1e-6)
    for pixels, found in (
        (PIXELS, side.clean_probabilities),
        (expected, side.perturbed_probabilities),
    ):
        share = sigmoid((WEIGHTS * pixels[..., 0]).sum())
        np.testing.assert_allclose(found, [1 - share, share], atol=1e-5)
    assert side.attacked_class == label
    np.testing.assert_array_equal(side.clean, PIXELS)


@pytest.mark.parametrize("outputs", ["logits", "softmax", "sigmoid"])
def test_all_forms_of_outputs_are_read(outputs):
    model = linear(outputs=outputs)
    side = explore(model)
    share = sigmoid((WEIGHTS * PIXELS[..., 0]).sum())
    np.testing.assert_allclose(side.clean_probabilities, [1 - share, share], atol=1e-5)
    # Without a label, the attack leads away from what the model sees.
    assert side.attacked_class == side.clean_probabilities.argmax() == 1
    assert side.perturbed_probabilities[1] < side.clean_probabilities[1] - 0.1


def test_logits_that_look_like_probabilities():
    model = linear(0 * WEIGHTS)
    model.layers[-1].set_weights([np.full((4, 2), 0.5 / 4)])
    model.add(layers.Lambda(lambda x: 0 * x + 0.5))
    as_logits, as_shares = (explore(model, from_logits=it) for it in (True, False))
    np.testing.assert_allclose(as_logits.clean_probabilities, 0.5)
    np.testing.assert_allclose(as_shares.clean_probabilities, 0.5)


@pytest.mark.parametrize("attack", explorer.ATTACKS)
def test_each_attack_stays_in_its_ball_and_repeats(attack):
    sides = explorer.SideBySide({"one": linear()}, SHAPE)
    orders = {NormType.L1: 1, NormType.L2: 2, NormType.INFINITY: np.inf}
    for norm in explorer.ATTACKS[attack][0].norms:
        for epsilon in (0.0, 0.2):
            one, again = (
                sides.explore(PIXELS, attack, norm, epsilon)["one"] for _ in range(2)
            )
            np.testing.assert_array_equal(one.perturbed, again.perturbed)
            length = np.linalg.norm(one.perturbation.ravel(), orders[norm])
            assert length <= epsilon + 1e-6
            assert (length > 0) == (epsilon > 0)
            assert one.perturbed.min() >= 0
            assert one.perturbed.max() <= 1


def test_each_model_is_attacked_by_itself():
    networks = {"one": linear(), "other": linear(-WEIGHTS)}
    found = explorer.SideBySide(networks, SHAPE).explore(
        PIXELS, "FGSM", "infinity", 0.02, label=1
    )
    assert list(found) == ["one", "other"]
    np.testing.assert_allclose(
        found["one"].perturbation, -found["other"].perturbation, atol=1e-6
    )


def test_an_attack_takes_all_its_steps():
    # One that stopped where the model is fooled would stop after few.
    side = explore(linear(), "PGD", epsilon=0.3)
    np.testing.assert_allclose(
        side.perturbed, np.clip(PIXELS - 0.3 * np.sign(WEIGHTS)[..., None], 0, 1)
    )
    assert side.perturbed_probabilities.argmax() == 0


def test_a_move_of_the_radius_compiles_nothing():
    model = linear()
    sides = explorer.SideBySide({"one": model}, SHAPE)
    for attack, norm in (("PGD", "infinity"), ("APGD", "l2")):
        sides.explore(PIXELS, attack, norm, 0.1)
        compiled = set(functions_of(model).keys)
        for epsilon in (0.0, 0.15, 0.3):
            sides.explore(PIXELS, attack, norm, epsilon)
        assert set(functions_of(model).keys) == compiled


def test_pictures_are_of_the_model_as_it_is_now():
    model = linear(outputs="softmax")
    sides = explorer.SideBySide({"one": model}, SHAPE)
    before = sides.explore(PIXELS, "FGSM", "infinity", 0.1)["one"]
    model.layers[-1].activation = keras.activations.linear
    model.layers[-1].kernel.assign(-model.layers[-1].kernel)
    after = sides.explore(PIXELS, "FGSM", "infinity", 0.1, label=1)["one"]
    np.testing.assert_allclose(
        after.clean_probabilities, before.clean_probabilities[::-1], atol=1e-6
    )


@pytest.mark.parametrize("form", ["dictionary", "no channels", "wrapped", "bytes"])
def test_forms_of_models(form):
    plain = linear()
    if form == "dictionary":
        pixels = keras.Input(SHAPE, name="image")
        model = keras.Model({"image": pixels}, plain(pixels))
    elif form == "no channels":
        model = linear(shape=SHAPE[:2])
    elif form == "wrapped":
        model = AdversarialRegularization(plain)
    else:
        pixels = keras.Input(SHAPE, dtype="uint8")
        scaled = layers.Rescaling(1 / 255)(pixels)
        model = keras.Model(pixels, plain(scaled))
    high = 255.0 if form == "bytes" else 1.0
    shape = explorer.picture_shape(model)
    assert shape == SHAPE
    expected = explore(plain)
    found = explore(model, epsilon=0.1 * high, pixel_range=(0.0, high))
    np.testing.assert_allclose(found.perturbed, expected.perturbed, atol=1e-6)
    np.testing.assert_allclose(
        found.perturbed_probabilities, expected.perturbed_probabilities, atol=1e-5
    )


def test_sizes_that_a_model_leaves_open_come_from_the_dataset():
    model = keras.Sequential([keras.Input((None, None, 3)), layers.Flatten()])
    assert explorer.picture_shape(model, (32, 16, 3)) == (32, 16, 3)
    assert explorer.picture_shape(keras.Sequential(), (8, 8, 1)) == (8, 8, 1)
    with pytest.raises(ValueError, match="leaves the size of its images open"):
        explorer.picture_shape(model)


@pytest.mark.parametrize(
    ("inputs", "received"),
    [
        ([(64,)], r"an input of shape \(64,\)"),
        ([(8, 8, 4)], r"an input of shape \(8, 8, 4\)"),
        ([(8, 8, 1), (2,)], r"inputs of shape \(8, 8, 1\), \(2,\)"),
    ],
)
def test_models_of_something_else_are_refused(inputs, received):
    tensors = [keras.Input(shape) for shape in inputs]
    flat = [layers.Flatten()(tensor) for tensor in tensors]
    model = keras.Model(tensors, layers.Concatenate()([*flat, flat[0]]))
    message = f"must classify images: .* Received: {received}"
    with pytest.raises(ValueError, match=message):
        explorer.picture_shape(model)
    with pytest.raises(ValueError, match="an input of shape unknown"):
        explorer.picture_shape(keras.Sequential())


def test_models_that_are_no_classifiers_are_refused():
    def sides(**models):
        return explorer.SideBySide(models, SHAPE)

    regression = linear()
    regression.compile(loss="mean_squared_error")
    with pytest.raises(
        ValueError, match=r"must be a classifier\. .*mean_squared_error"
    ):
        sides(one=regression)
    maps = keras.Sequential([keras.Input(SHAPE), layers.Conv2D(3, 1)])
    with pytest.raises(ValueError, match=r"must give class scores.*2, 2, 3"):
        sides(one=maps)
    three = keras.Sequential(
        [keras.Input(SHAPE), layers.Flatten(), layers.Dense(3, "softmax")]
    )
    with pytest.raises(ValueError, match="Received: one has 2, other has 3"):
        sides(one=linear(), other=three)


def test_wrong_arguments_are_refused():
    sides = explorer.SideBySide({"one": linear()}, SHAPE)
    with pytest.raises(ValueError, match=r"`attack` must be one of .* Received: 'X'"):
        sides.explore(PIXELS, "X", "l2", 0.1)
    with pytest.raises(ValueError, match="`pixels` must be of shape"):
        sides.explore(PIXELS[..., 0], "FGSM", "l2", 0.1)
    with pytest.raises(ValueError, match="not defined for others"):
        sides.explore(PIXELS, "APGD", "l1", 0.1)
    with pytest.raises(ValueError, match="no numbers"):
        sides.explore(np.full_like(PIXELS, np.nan), "FGSM", "l2", 0.1)


def test_radii_to_begin_with():
    def radii(shape, high=1.0):
        model = keras.Sequential([keras.Input(shape), layers.Flatten()])
        sides = explorer.SideBySide({"one": model}, shape, pixel_range=(0.0, high))
        return [sides.radius(norm) for norm in ("infinity", "l2", "l1")]

    assert radii((8, 8, 1)) == [0.15, 0.7, 3.0]
    assert radii((28, 28, 1), 255.0) == pytest.approx([51.0, 510.0, 2550.0])
    assert radii((64, 64, 3)) == pytest.approx([8 / 255, 1.0, 48.0])


def saved(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image_of(values, mode=None):
    image = image_module.fromarray(np.asarray(values, "uint8"))
    return image if mode is None else image.convert(mode)


def test_a_picture_that_fits_is_not_touched():
    values = np.arange(64, dtype="uint8").reshape(8, 8)
    picture = explorer.read_picture(saved(image_of(values)), "a.png", (8, 8, 1))
    np.testing.assert_allclose(picture.pixels[..., 0], values / 255, atol=1e-7)
    assert picture.pixels.dtype == np.float32
    assert (picture.name, picture.label, picture.note) == ("a.png", None, "")


def test_other_sizes_and_colours_are_fitted_and_the_note_says_so():
    values = np.zeros((40, 80, 3), "uint8")
    values[:, 20:60] = (255, 0, 0)  # What is left and right of it is cut off.
    content = saved(image_of(values))
    grey = explorer.read_picture(content, "red", (10, 10, 1))
    assert grey.note == "Cut from 80×40 to 40×40, resized to 10×10, turned grey."
    np.testing.assert_allclose(grey.pixels, 76 / 255, atol=1e-6)
    wide = explorer.read_picture(content, "red", (40, 80, 3))
    assert wide.note == ""
    np.testing.assert_array_equal(wide.pixels, values.astype("float32") / 255)
    rgb = explorer.read_picture(saved(image_of(values[..., 0])), "grey", (40, 80, 3))
    assert rgb.note == "Turned to RGB."
    np.testing.assert_array_equal(rgb.pixels[..., 1], rgb.pixels[..., 0])


def test_what_else_images_hold():
    clear = np.zeros((4, 4, 4), "uint8")
    clear[:2, :, 3] = 255  # Black above, nothing below.
    picture = explorer.read_picture(saved(image_of(clear)), "clear", (4, 4, 1))
    np.testing.assert_array_equal(picture.pixels[:, 0, 0], [0, 0, 1, 1])
    assert picture.note == "Put on white, turned grey."

    deep = np.array([[0, 65535], [32768, 257]], "uint16")
    content = saved(image_module.fromarray(deep))
    picture = explorer.read_picture(content, "deep", (2, 2, 1))
    np.testing.assert_array_equal(
        picture.pixels[..., 0] * 255, np.array([[0, 255], [128, 1]], "float32")
    )

    frames = [image_of(np.full((2, 2), value)) for value in (0, 255)]
    content = saved(frames[0], "gif", save_all=True, append_images=frames[1:])
    picture = explorer.read_picture(content, "film", (2, 2, 1))
    assert picture.note.startswith("The first of 2 frames")
    assert picture.pixels.max() == 0

    turned = image_module.Exif()
    turned[0x0112] = 3  # Upside down.
    content = saved(image_of([[0], [255]]), exif=turned)
    picture = explorer.read_picture(content, "turned", (2, 1, 1))
    np.testing.assert_array_equal(picture.pixels.ravel(), [1, 0])


NOISE = image_of(np.random.default_rng(0).integers(0, 255, (64, 64)))


def huge_png():
    """The beginning of a PNG that says it has 10^10 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    body = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + body + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "“it” is empty"),
        (b"Hello, I am text.\n", "“it” is no image. Choose a PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is no"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is no image"),
        (saved(NOISE)[:900], "cannot be read, it may be damaged"),
        (saved(NOISE, "jpeg")[:900], "may be damaged"),
        (huge_png(), "“it” has more than 50 million pixels"),
    ],
    ids=["empty", "text", "eps", "svg", "cut png", "cut jpeg", "huge"],
)
def test_what_is_no_image_is_refused(content, message):
    with pytest.raises(explorer.PictureError, match=message):
        explorer.read_picture(content, "it", (8, 8, 1))


def test_perturbations_in_colours():
    grey = np.array([[[-0.1], [0.0], [0.1]]])
    (darker, same, lighter), *_ = pictures.magnify(grey, 0.1)
    np.testing.assert_allclose(same, 1)
    assert darker[2] > darker[0]
    assert lighter[0] > lighter[2]
    rgb = np.array([[[-0.2, 0.0, 0.1]]])
    np.testing.assert_allclose(pictures.magnify(rgb, 0.2)[0, 0], [0, 0.5, 0.75])
    assert (pictures.magnify(0 * rgb, 0.0) == 0.5).all()


def test_thumbnails_keep_their_pixels_square():
    drawn = pictures.thumbnail(PIXELS)
    assert drawn.shape == (96, 96, 3)
    assert (drawn[:48, :48] == round(0.5 * 255)).all()
    assert pictures.thumbnail(np.zeros((100, 200, 3))).shape == (100, 200, 3)


def dataset(labels, classes=3):
    images = np.linspace(0, 1, len(labels) * 4, dtype="float32")
    images, labels = images.reshape(-1, 2, 2, 1), np.array(labels)
    names = tuple("abcdef"[:classes])
    return ImageDataset("set", images, labels, images, labels, classes, names)


def test_examples_of_a_dataset_are_of_all_classes():
    data = dataset([2] * 20 + [0, 1, 1])
    examples = explorer.load_examples(data, SHAPE, 3)
    assert [one.label for one in examples.pictures[:3]] == [0, 1, 2]
    assert len(examples.pictures) == 12
    assert examples.pictures[0].name == "Test image 20 of set"
    np.testing.assert_array_equal(examples.pictures[0].pixels, data.x_test[20])
    assert examples.class_names == ("a", "b", "c")
    with pytest.raises(
        DatasetError, match=r"3 classes of 'set': .*models of 5 classes"
    ):
        explorer.load_examples(data, SHAPE, 5)


def test_examples_without_a_dataset_claim_no_class():
    pytest.importorskip("sklearn")
    grey = explorer.load_examples(None, (28, 28, 1), 4)
    assert {one.label for one in grey.pictures} == {None}
    assert grey.pictures[0].pixels.shape == (28, 28, 1)
    assert grey.pictures[0].note == "Resized to 28×28."
    assert list(grey.class_names) == ["0", "1", "2", "3"]
    photographs = explorer.load_examples(None, (48, 64, 3), 2).pictures
    assert [one.pixels.shape for one in photographs] == [(48, 64, 3)] * 2


def side(on_clean, on_perturbed, attacked=0, moved=0.25):
    return explorer.Side(
        PIXELS, PIXELS + moved, np.array(on_clean), np.array(on_perturbed), attacked
    )


def test_the_page_says_what_happened():
    names = ["<cat>", "dog", "eel", "fly"]
    picture = explorer.Picture(PIXELS, "<b>.png", 0, "Turned grey.")
    sides = {
        "holds & stands": side([0.9, 0.1, 0, 0], [0.6, 0.4, 0, 0]),
        "falls": side([0.9, 0.1, 0, 0], [0.003, 0.9, 0.09, 0.007], moved=0.2),
        "wrong": side([0.1, 0.9, 0, 0], [0.1, 0.9, 0, 0]),
    }
    html = view.show_sides(picture, sides, names)
    assert "<b>.png" not in html
    assert "&lt;b&gt;.png" in html
    assert "True class: <b>&lt;cat&gt;</b>." in html
    assert "Turned grey." in html
    holds, falls, wrong = html.split("<section")[1:]
    assert "holds &amp; stands" in holds
    assert "✓ holds" in holds
    assert "✗ fooled" in falls
    assert "✗ wrong already" in wrong
    # All are magnified alike, and each says how far it went.
    assert "perturbation ×&nbsp;4.0<" in holds
    assert "perturbation ×&nbsp;4.0<" in falls
    assert "up to ±0.25" in holds
    assert "up to ±0.2" in falls
    # The attacked class is shown, even where it has become the last.
    assert falls.count('data-class="&lt;cat&gt;"') == 2
    assert "0.3 %" in falls
    unknown = explorer.Picture(PIXELS, "mine")
    html = view.show_sides(unknown, {"one": side([0.1, 0.9], [0.2, 0.8], 1, 0)}, names)
    assert "True class" not in html
    assert "✓ holds" in html
    assert "up to ±0<" in html


def test_messages_are_escaped():
    assert "&lt;x&gt;" in view.show_message("<x>")
    assert view.show_message("") == ""
