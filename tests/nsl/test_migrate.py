import json
import os
import stat
import sys
from pathlib import Path

import pytest
from helpers.notebooks import notebook

from advreg import nsl
from advreg.nsl import migrate
from advreg.nsl.migrate import diff, find, migrate_notebook, migrate_python, read, write

NSL = "neural_structured_learning"


def reason(module, name):
    """What `advreg.nsl` says of a name that it does not have."""
    with pytest.raises(AttributeError) as raised:
        getattr(module, name)
    repeated = f"module {module.__name__!r} has no attribute {name!r}: "
    return str(raised.value).removeprefix(repeated)


def told(migration):
    return [(place.line, place.what) for place in migration.places]


def moved(code):
    """Migrates code of which nothing is left for a person."""
    migration = migrate_python(code)
    assert not migration.places
    assert not migrate_python(migration.after).places
    assert migrate_python(migration.after).after == migration.after
    compile(migration.after, "moved", "exec")
    return migration.after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"import {NSL} as nsl", "from advreg import nsl"),
        (f"import {NSL} as n", "from advreg import nsl as n"),
        (f"import {NSL}", f"from advreg import nsl as {NSL}"),
        (f"import {NSL}.configs", f"from advreg import nsl as {NSL}"),
        (f"import {NSL}.configs as configs", "from advreg.nsl import configs"),
        (f"import {NSL}.lib.utils as utils", "from advreg.nsl import lib as utils"),
        (
            f"import {NSL}.keras.adversarial_regularization as keras",
            "from advreg.nsl import keras",
        ),
        (f"from {NSL} import configs", "from advreg.nsl import configs"),
        (
            f"from {NSL} import configs as c,  keras, lib",
            "from advreg.nsl import configs as c,  keras, lib",
        ),
        (
            f"from {NSL}.configs import NormType as N, AdvRegConfig",
            "from advreg.nsl.configs import NormType as N, AdvRegConfig",
        ),
        (
            f"from {NSL}.configs.configs import DEFAULT_ADVERSARIAL_PARAMS",
            "from advreg.nsl.configs import DEFAULT_ADVERSARIAL_PARAMS",
        ),
        (f"from {NSL}.configs import configs", "from advreg.nsl import configs"),
        (
            f"from {NSL}.keras.adversarial_regularization import adversarial_loss",
            "from advreg.nsl.keras import adversarial_loss",
        ),
        (
            f"from {NSL}.lib.regularizer import virtual_adv_regularizer as v",
            "from advreg.nsl.lib import virtual_adv_regularizer as v",
        ),
        (f"from {NSL}.lib import distances", "from advreg.nsl import lib as distances"),
        (f"from {NSL}.lib import utils as lib", "from advreg.nsl import lib"),
        (
            f"from {NSL}.lib import adversarial_neighbor as adv_lib, utils",
            "from advreg.nsl import lib as adv_lib, lib as utils",
        ),
        (
            f"from {NSL}.lib import utils, normalize",
            "from advreg.nsl import lib as utils\nfrom advreg.nsl.lib import normalize",
        ),
        (
            f"import {NSL}.lib, {NSL}.configs as c, {NSL}",
            f"from advreg import nsl as {NSL}\nfrom advreg.nsl import configs as c",
        ),
        (
            f"import numpy as np, {NSL} as nsl, os.path  # why",
            "import numpy as np, os.path\nfrom advreg import nsl  # why",
        ),
        (
            f"if True: import os, {NSL} as nsl; x = nsl",
            "if True: import os; from advreg import nsl; x = nsl",
        ),
        (
            f"from {NSL}.lib import (  # names\n  utils, normalize,  # one\n)  # end",
            "# names\n# one\nfrom advreg.nsl import lib as utils\n"
            "from advreg.nsl.lib import normalize  # end",
        ),
        (
            f"from {NSL} import (\n  configs,  # one\n  lib as l,\n)",
            "from advreg.nsl import (\n  configs,  # one\n  lib as l,\n)",
        ),
    ],
)
def test_imports(before, after):
    assert moved(before) == after
    # The same within a function, and with Windows's ends of lines.
    inside = "\r\n".join(f"\t{line}" for line in after.split("\n"))
    block = before.replace("\n", "\r\n\t")
    if "import (" not in before:
        assert moved(f"def f():\r\n\t{block}\r\n") == f"def f():\r\n{inside}\r\n"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("nsl.lib.utils.normalize(x)", "nsl.lib.normalize(x)"),
        ("nsl.configs.configs.NormType.L2", "nsl.configs.NormType.L2"),
        ("f(a)[nsl.lib.utils.normalize].b", "f(a)[nsl.lib.normalize].b"),
        ("nsl . lib . utils . normalize", "nsl . lib  . normalize"),
        (
            "(nsl.lib  # one\n .utils  # two\n .normalize)",
            "(nsl.lib  # one\n   # two\n .normalize)",
        ),
        (
            "x = '€😀'; nsl.lib.utils.normalize; nsl.lib.distances.kl_divergence",
            "x = '€😀'; nsl.lib.normalize; nsl.lib.kl_divergence",
        ),
        ("f'{nsl.lib.utils.normalize(1)}'", "f'{nsl.lib.normalize(1)}'"),
        (
            "def f(a: nsl.configs.configs.NormType = 1): nsl.lib.utils.normalize",
            "def f(a: nsl.configs.NormType = 1): nsl.lib.normalize",
        ),
        # Shadowed.
        ("def f(nsl): nsl.lib.utils.x()", "def f(nsl): nsl.lib.utils.x()"),
        ("[nsl.lib.utils.x for nsl in y]", "[nsl.lib.utils.x for nsl in y]"),
        ("self.nsl.lib.utils.x", "self.nsl.lib.utils.x"),
        ("def f(x: 'nsl.lib.utils'): ...", "def f(x: 'nsl.lib.utils'): ..."),
        # Under another name.
        ("lib = nsl.lib; lib.utils.normalize", "lib = nsl.lib; lib.normalize"),
        ("u = nsl.lib.utils; v = u; v.normalize", "u = nsl.lib; v = u; v.normalize"),
        ("__all__ = ['nsl', 'lib.utils']", "__all__ = ['nsl', 'lib.utils']"),
    ],
)
def test_names(code, expected):
    head = "from advreg import nsl\n"
    assert moved(f"import {NSL} as nsl\n{code}\n") == f"{head}{expected}\n"


def test_names_of_imports_without_alias():
    code = f"import {NSL}.lib.utils\ny = {NSL}.lib.utils.normalize(x)\n"
    assert moved(code) == (
        f"from advreg import nsl as {NSL}\ny = {NSL}.lib.normalize(x)\n"
    )


@pytest.mark.parametrize("other", ["nsl = None", "from advreg import nsl"])
def test_imports_that_may_fail(other):
    code = f"try:\n  import {NSL} as nsl\nexcept ImportError:\n  {other}\nnsl.lib"
    after = moved(f"{code}.utils.normalize\n")
    assert after == f"{code}.normalize\n".replace(
        f"import {NSL} as", "from advreg import"
    )


def test_a_name_that_is_bound_to_something_else_as_well():
    migration = migrate_python(
        f"import {NSL} as nsl\nnsl = fake()\nnsl.lib.utils.normalize\nnsl.lib.normalize"
    )
    assert migration.after.startswith("from advreg import nsl\nnsl = fake()\nnsl.lib.u")
    assert told(migration) == [(3, "`nsl.lib.utils`")]
    assert "leave out `.utils`" in migration.places[0].why


def test_what_advreg_does_not_have_stays_and_is_listed():
    migration = migrate_python(
        f"from {NSL} import configs, estimator, keras as k\n"
        f"from {NSL}.keras.layers import PairwiseDistance\n"
        f"from {NSL}.lib.utils import normalize, _expand\n"
        f"import {NSL}.tools as tools, {NSL}.lib as lib\n"
        f"from {NSL}.keras.graph_regularization import GraphRegularization as G\n"
        "PairwiseDistance()\n"
        "k.layers.PairwiseDistance()\n"
        "G(configs.make_graph_reg_config(\n"
        "    configs.GraphNeighborConfig()))\n"
        "lib.unheard_of(tools.pack_nbrs)\n"
    )
    assert migration.after.splitlines()[:9] == [
        f"from {NSL} import estimator",
        "from advreg.nsl import configs, keras as k",
        f"from {NSL}.keras.layers import PairwiseDistance",
        f"from {NSL}.lib.utils import _expand",
        "from advreg.nsl.lib import normalize",
        f"import {NSL}.tools as tools",
        "from advreg.nsl import lib",
        f"from {NSL}.keras.graph_regularization import GraphRegularization as G",
        "PairwiseDistance()",
    ]
    layers, tools = reason(nsl.keras, "layers"), reason(nsl, "tools")
    yourself = ": do without it, or write it yourself"
    graph = reason(nsl.keras, "GraphRegularization")
    assert {(place.line, place.what, place.why) for place in migration.places} == {
        (1, f"import of `{NSL}.estimator`", reason(nsl, "estimator")),
        (2, f"import of `{NSL}.keras.layers.PairwiseDistance`", layers),
        (
            3,
            f"import of `{NSL}.lib.utils._expand`",
            reason(nsl.lib, "_expand") + yourself,
        ),
        (4, f"import of `{NSL}.tools`", tools),
        (
            5,
            f"import of `{NSL}.keras.graph_regularization.GraphRegularization`",
            graph,
        ),
        (6, "`PairwiseDistance`", layers),
        (7, "`k.layers.PairwiseDistance`", layers),
        (8, "`G`", graph),
        (
            8,
            "`configs.make_graph_reg_config`",
            reason(nsl.configs, "make_graph_reg_config"),
        ),
        (
            9,
            "`configs.GraphNeighborConfig`",
            reason(nsl.configs, "GraphNeighborConfig"),
        ),
        (10, "`lib.unheard_of`", reason(nsl.lib, "unheard_of") + yourself),
        (10, "`tools.pack_nbrs`", tools),
    }
    # The second time, nothing is left but what had to stay.
    assert migrate_python(migration.after).after == migration.after


def test_reasons_do_not_repeat_what_is_missing():
    migration = migrate_python(
        f"import {NSL} as nsl\n"
        f"from {NSL}.keras import GraphRegularization\n"
        "nsl.keras.GraphRegularization()\n"
    )
    graphs = "graph regularisation is no part of advreg"
    names = [f"import of `{NSL}.keras.GraphRegularization`", "`nsl.keras.GraphReg"]
    for place, name in zip(migration.places, names, strict=True):
        assert place.at("a.py").startswith(f"a.py:{place.line}: {name}")
        assert f"`: {graphs}" in place.at("a.py")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("{0}\n{0}.lib.utils\nx = 1\n", "{1}\nx = 1\n"),
        ("{0}.lib\nx = 1\n# one\n{0}.lib.utils  # two", "{1}\nx = 1\n# one\n# two"),
        ("{0}\r\n{0}.lib\r\n{0}.keras\r\nx", "{1}\r\nx"),
        ("{0}\n{0}.lib as lib", "{1}\nfrom advreg.nsl import lib"),
        ("{0}\nimport os, NSL.lib\n", "{1}\nimport os\n"),
        ("try:\n  {0}\n  {0}.lib\nfinally:\n  x = 1", "try:\n  {1}\nfinally:\n  x = 1"),
        # Where something would be lost, both stay.
        ("{0}\nif x:\n  {0}.lib\n", "{1}\nif x:\n  {1}\n"),
        ("{0}\ndef f(): {0}.lib\n", "{1}\ndef f(): {1}\n"),
        ("{0}\n{0}.lib;\nx = 1", "{1}\n{1};\nx = 1"),
        ("{0}\nx = 1; {0}.lib", "{1}\nx = 1; {1}"),
        ("{0}\nNSL = 1\n{0}.lib", "{1}\nNSL = 1\n{1}"),
    ],
)
def test_imports_that_come_to_the_same_stand_once(code, expected):
    before = code.format(f"import {NSL}").replace("NSL", NSL)
    after = expected.format("", f"from advreg import nsl as {NSL}").replace("NSL", NSL)
    assert moved(before) == after


def test_imports_that_come_to_the_same_stand_once_in_a_cell():
    cells = [f"import {NSL}\n", f"import {NSL}.lib\n", "x = 1\n", f"import {NSL}.keras"]
    book = notebook(["!ls\n", *cells], "".join(cells), cells[:1])
    migration = migrate_notebook(json.dumps(book, indent=1))
    new = f"from advreg import nsl as {NSL}\n"
    book["cells"][0]["source"] = ["!ls\n", new, "x = 1"]
    book["cells"][1]["source"] = f"{new}x = 1"
    book["cells"][2]["source"] = [new]
    assert migration.after == json.dumps(book, indent=1)


def test_names_that_are_there_but_not_public_are_listed(monkeypatch):
    monkeypatch.setattr(nsl.lib, "_helper", 1, raising=False)
    migration = migrate_python(f"import {NSL} as nsl\nnsl.lib._helper()\n")
    assert told(migration) == [(2, "`nsl.lib._helper`")]
    assert "no public attribute '_helper': do without" in migration.places[0].why


def test_imports_that_cannot_be_moved_are_listed():
    code = (
        f"from {NSL}.configs import *\n"
        "import importlib\n"
        f"importlib.import_module('{NSL}.keras')\n"
        f"__import__('{NSL}')\n"
        f"if 1: from {NSL}.lib import (utils,  # why\n  normalize); x = 1\n"
    )
    migration = migrate_python(code)
    assert migration.after == code
    assert told(migration) == [
        (1, f"`from {NSL}.configs import *`"),
        (3, f"`{NSL}` in a string"),
        (4, f"`{NSL}` in a string"),
        (5, "import of several names"),
    ]
    assert all("by name is not followed" in p.why for p in migration.places[1:3])


def test_strings_are_listed_and_docstrings_are_not():
    code = (
        f'"""Of {NSL}."""\n# {NSL}\n'
        f"class A: '{NSL}'\n"
        f"def f():\n  r'''{NSL}''' '{NSL}'\n  return '''\n\n{NSL} '''\n"
        f"x = 'pip install Neural-Structured-Learning', f'{{x}} {NSL}'\n"
        f"if x:\n  '{NSL}'\n"
    )
    migration = migrate_python(code)
    assert migration.after == code
    assert told(migration) == [
        (8, f"`{NSL}` in a string"),
        (9, "`Neural-Structured-Learning` in a string"),
        (9, f"`{NSL}` in a string"),
        (11, f"`{NSL}` in a string"),
    ]


def test_modules_that_are_handed_on_are_listed():
    migration = migrate_python(
        f"import {NSL} as nsl\nself.nsl = nsl\ngetattr(nsl.lib, 'x')\n"
        "print(nsl, nsl.lib); f(nsl.__version__)"
    )
    assert told(migration) == [(2, "`nsl`"), (3, "`nsl.lib`")]


KERAS = """
import attr, keras, os
import tensorflow as tf
from keras.models import load_model
from tensorflow.compat import v1
from tensorflow.keras.wrappers.scikit_learn import KerasClassifier

base = keras.Sequential()
model = nsl.keras.AdversarialRegularization(base, label_keys=["y"])
model.save("saved")
model.save("saved.keras"); model.save(path); model.save_weights("w.weights.h5")
base.save(f"{folder}/model")
model.base_model.save(os.path.join(folder, "model"))
self.model.base_model.save(folder / "model")
another.save("saved"); base.save(f"model{x}"); model.save(b"x"); model.save()
model.save_weights(filepath="weights")
load_model("saved"); load_model("saved.h5")
tf.keras.callbacks.ModelCheckpoint("point")
K = tf.keras.backend; K.get_session()
v1.disable_eager_execution()
tf.compat.v1.disable_v2_behavior()
KerasClassifier(tf.keras.utils.to_categorical(y))
tf.feature_column.numeric_column("x")
tf.keras.layers.DenseFeatures(columns)
tf.estimator.DNNClassifier()
tf.keras.experimental.LinearModel()
attr.evolve(config, multiplier=1); attr.asdict(config)
attr.s(attr.ib())
super().__init__(dynamic=True); f(dynamic=False)
model.perturb_on_batch(x, pgd_epsilon=None, clip_value_max=1)
f(pgd_epsilon=None)
"""


def test_what_keras_3_has_changed_is_listed():
    migration = migrate_python(f"import {NSL} as nsl{KERAS}")
    assert migration.after == f"from advreg import nsl{KERAS}"
    saved = "of a path that ends in"
    assert told(migration) == [
        (6, "import of `tensorflow.keras.wrappers.scikit_learn.KerasClassifier`"),
        (10, f"`model.save` {saved} 'saved'"),
        (12, f"`base.save` {saved} '/model'"),
        (13, f"`model.base_model.save` {saved} 'model'"),
        (14, f"`self.model.base_model.save` {saved} 'model'"),
        (16, f"`model.save_weights` {saved} 'weights'"),
        (17, f"`load_model` {saved} 'saved'"),
        (18, f"`tf.keras.callbacks.ModelCheckpoint` {saved} 'point'"),
        (19, "`K.get_session`"),
        (20, "`v1.disable_eager_execution`"),
        (21, "`tf.compat.v1.disable_v2_behavior`"),
        (22, "`KerasClassifier`"),
        (23, "`tf.feature_column.numeric_column`"),
        (24, "`tf.keras.layers.DenseFeatures`"),
        (25, "`tf.estimator.DNNClassifier`"),
        (26, "`tf.keras.experimental.LinearModel`"),
        (27, "`attr.asdict`"),
        (27, "`attr.evolve`"),
        (29, "`dynamic=True`"),
        (30, "`pgd_epsilon=None`"),
    ]


TRAINER = """
import keras
import tensorflow as tf

class Model(keras.Model):
  def train_step(self, data):
    loss = self.compiled_loss(y, z, regularization_losses=self.losses)
    self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
    self.compiled_metrics.update_state(y, z)

adam = tf.keras.optimizers.Adam()
adam.minimize(loss, variables)
old = tf.compat.v1.train.AdamOptimizer(0.1)
optimizer = tf.compat.v1.train.AdamOptimizer(0.1)
old.minimize(loss); optimizer.minimize(loss); scipy.optimize.minimize(f, x)
keras.backend.set_value(model.optimizer.lr, 0.1)
(self
  .d_optimizer
  .lr) = args.lr
keras.optimizers.SGD().lr
f(optimizer.minimize, self.optimizer.learning_rate)
"""


def test_what_models_took_of_the_trainer_is_listed():
    migration = migrate_python(f"import {NSL} as nsl{TRAINER}")
    assert migration.after == f"from advreg import nsl{TRAINER}"
    assert told(migration) == [
        (7, "`self.compiled_loss`"),
        (8, "`self.optimizer.minimize`"),
        (9, "`self.compiled_metrics`"),
        (12, "`adam.minimize`"),
        (16, "`model.optimizer.lr`"),
        (17, "`self .d_optimizer .lr`"),
        (20, "`keras.optimizers.SGD().lr`"),
    ]
    for place, new in zip(
        migration.places,
        ["compute_loss", "apply_gradients", "compute_metrics", "apply_gradients"]
        + 3 * ["learning_rate"],
        strict=True,
    ):
        assert new in place.why
    assert not migrate_python(f"# {NSL}{TRAINER}").places


def test_names_in_logs_are_listed():
    code = (
        "EarlyStopping(monitor='val_scaled_adversarial_loss')\n"
        "f('scaled_adversarial_loss', 'of val_scaled_adversarial_loss', 'lr')\n"
        "logs['lr'], model.fit(x).history[\"lr\"], history.history.get('lr', [])\n"
        "config['lr'], config.get('lr'), logs['loss'], logs[lr], logs.pop('lr')\n"
        "{'lr': 1}, logs['lr':], logs.get('loss', 'lr'), get('lr')\n"
    )
    migration = migrate_python(f"import {NSL} as nsl\n{code}")
    assert migration.after == f"from advreg import nsl\n{code}"
    assert told(migration) == [
        (2, "`val_scaled_adversarial_loss`"),
        (4, '"lr" of the logs'),
        (4, "'lr' of the logs"),
    ]
    assert "RobustAccuracy, or monitor val_loss" in migration.places[0].why
    assert "learning_rate" in migration.places[1].why
    assert not migrate_python(f"# {NSL}\n{code}").places


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        ("ck = os.path.join(out, 'ck-{epoch:02d}'); load_model(ck)", "ck-{epoch:02d}"),
        ("CK: str = 'best'\ndef f(): load_model(filepath=CK)", "best"),
        ("a = b = 'best'; c = str(a); load_model(out / c)", "best"),
        ("name = 'best'; load_model(f'{out}/{name}')", "best"),
        (r"name = 'models\day'; load_model(name)", r"models\day"),
        ("CK = 'best.keras'; load_model(CK)", None),
        ("CK = 'best'; CK = 'best.keras'; load_model(CK)", None),
        ("CK = 'best'; CK += '.keras'; load_model(CK)", None),
        ("CK = 'best'\ndef f(CK): load_model(CK)", None),
        ("CK = 'best'\ndef f():\n  global CK; CK = x\nload_model(CK)", None),
        ("for CK in ['best']: load_model(CK)", None),
        ("CK, x = 'best', 1; load_model(CK); load_model(self.CK)", None),
        ("CK = CK + 'best' if x else CK; load_model(CK)", None),
        ("a = b; b = a; load_model(a)", None),
        ("CK: str; load_model(CK); load_model(open); load_model(unknown)", None),
        ("end = 'keras'; load_model('best.' + end); load_model(f'best.{end}')", None),
        ("n = 'best'; load_model('%s.keras' % n); load_model(f'{n!r}{n:>9}')", None),
    ],
)
def test_paths_are_followed_through_names_that_are_assigned_once(code, ending):
    head = f"from keras.models import load_model\nimport {NSL}\n"
    whats = [place.what for place in migrate_python(f"{head}{code}\n").places]
    expected = f"`load_model` of a path that ends in {ending!r}"
    assert whats == ([] if ending is None else [expected])


def test_paths_in_names_are_followed_wherever_they_go():
    migration = migrate_python(
        f"import keras\nimport {NSL} as nsl\nCK = 'best'\n"
        "model = nsl.keras.AdversarialRegularization(base)\n"
        "keras.callbacks.ModelCheckpoint(CK)\nmodel.save(CK); base.save_weights(CK)\n"
    )
    assert told(migration) == [
        (5, "`keras.callbacks.ModelCheckpoint` of a path that ends in 'best'"),
        (6, "`base.save_weights` of a path that ends in 'best'"),
        (6, "`model.save` of a path that ends in 'best'"),
    ]


def test_code_without_nsl_is_not_looked_at():
    assert migrate_python(f"{KERAS}(").after == f"{KERAS}("  # It is not even parsed.
    assert not migrate_python(f"# {NSL}{KERAS}").places
    assert not migrate_python(f"from .{NSL} import x\nimport {NSL}_2{KERAS}").places


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "libcst", None)
    with pytest.raises(ImportError, match=r"advreg\[migrate\]"):
        migrate_python(f"import {NSL}")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (f"import {NSL}\nprint 'x'", "line 2: .*print"),
        (f"import {NSL}\nx = '\0'", "null bytes"),
        (f"import {NSL}\nx = {'(' * 500}{')' * 500}", "line 2: too many nested"),
        (f"import {NSL}\nx = {'+'.join('1' * 2000)}", "line 1: .*too deeply"),
        (f"import {NSL}\nx = {'-' * 100_000}1", "line 1: .*too deeply"),
        (f"import {NSL}\n\tx = 1", "line 2: unexpected indent"),
    ],
    ids=["Python 2", "null", "brackets", "sum", "signs", "indent"],
)
def test_what_is_no_python_is_an_error(code, message):
    with pytest.raises(ValueError, match=message):
        migrate_python(code)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("!pip install neural-structured-learning", "!pip install advreg"),
        (
            "!pip install -q a neural_structured_learning b",
            "!pip install -q a advreg b",
        ),
        ("%pip install neural-structured-learning==1.3.1", "%pip install advreg"),
        (
            "!pip3 install 'neural-structured-learning>=1.3' b",
            "!pip3 install 'advreg' b",
        ),
        ("!pip install neural-structured-learning > log", "!pip install advreg > log"),
        (
            "!{sys.executable} -m pip install Neural.Structured.Learning[x]~=1.0;ls",
            "!{sys.executable} -m pip install advreg;ls",
        ),
        (
            "!pip install \\\n  neural-structured-learning \\\n  b && x",
            "!pip install \\\n  advreg \\\n  b && x",
        ),
        ("pip install neural-structured-learning", "pip install advreg"),
    ],
)
def test_installing(line, expected):
    text = json.dumps(notebook(["x = 1\n", line, "\ny = 2"]), indent=1)
    migration = migrate_notebook(text)
    assert told(migration) == [(2 + ("\n" in line), "`pip install advreg`")]
    assert "pip install PATH_TO_CHECKOUT" in migration.places[0].why
    cell = json.loads(migration.after)["cells"][0]
    assert "".join(cell["source"]) == f"x = 1\n{expected}\ny = 2"


@pytest.mark.parametrize(
    "line",
    [
        "!pip uninstall -y neural-structured-learning",
        "!pip install git+https://github.com/tensorflow/neural-structured-learning",
        "!pip install b && git clone neural-structured-learning",
        f"!python -m {NSL}.tools.pack_nbrs",
        f"%%bash\npip install {NSL}",
        f"%%writefile a.py\nimport {NSL}",
    ],
)
def test_other_commands_are_listed(line):
    text = json.dumps(notebook("", line))
    migration = migrate_notebook(text)
    assert migration.after == text
    (place,) = migration.places
    assert (place.cell, place.line) == (2, line.count("\n") + 1)
    assert "by hand" in place.why


def test_pins_beside_an_installation_are_listed():
    line = f"!pip install tensorflow==2.15 'keras<3' {NSL} tensorflow-hub==0.1"
    migration = migrate_notebook(json.dumps(notebook(line)))
    assert told(migration) == [(1, "`pip install advreg`"), (1, "`tensorflow==2.15`")]
    assert "tensorflow>=2.18" in migration.places[1].why


def test_how_to_install_is_said_once_for_a_notebook():
    install = f"!pip install {NSL}"
    migration = migrate_notebook(json.dumps(notebook("x", install, install)))
    (place,) = migration.places
    assert place.at("a.ipynb").startswith("a.ipynb, cell 2, line 1: `pip install adv")


def test_notebooks():
    output = {"output_type": "stream", "name": "stdout", "text": ["x" * 2_000_000]}
    book = notebook(
        [f"!pip install {NSL} numpy\n"],
        ["%%time\n", "import os\n", "\n", f"import {NSL} as nsl, numpy as np"],
        "%matplotlib inline\nx = (1\n% 2)\nnsl.lib.utils.normalize?\n",
        ["%time y = nsl.lib.utils.normalize(x)\n", "await nsl.lib.utils.normalize(y)"],
        ["def f(nsl):\n", "  return nsl.lib.utils\n"],
        ["nsl.keras.layers\n", "model.perturb_on_batch(x, feature_mask=None)"],
        ["x = \n"],
    )
    book["cells"].insert(1, {"cell_type": "markdown", "source": [f"Of {NSL} \u003c"]})
    book["cells"][0]["outputs"] = [output]
    text = json.dumps(book, indent=1).replace("<", "\\u003c") + "\n"
    migration = migrate_notebook(text)

    cells = book["cells"]
    cells[0]["source"] = ["!pip install advreg numpy\n"]
    cells[2]["source"][3:] = ["import numpy as np\n", "from advreg import nsl"]
    cells[4]["source"] = [
        "%time y = nsl.lib.normalize(x)\n",
        "await nsl.lib.normalize(y)",
    ]
    assert migration.after == json.dumps(book, indent=1).replace("<", "\\u003c") + "\n"
    assert [place.at("a b.ipynb").split(": ")[:2] for place in migration.places] == [
        ["a b.ipynb, cell 1, line 1", "`pip install advreg`"],
        ["a b.ipynb, cell 7, line 1", "`nsl.keras.layers`"],
        ["a b.ipynb, cell 7, line 2", "`feature_mask=None`"],
    ]
    assert [failure.split(":")[0] for failure in migration.failures] == [
        "cell 8, line 1"
    ]
    again = migrate_notebook(migration.after)
    assert again == migrate.Migration(migration.after, migration.after)

    assert diff(migration, Path("a b.ipynb")).splitlines()[:18] == [
        "--- a b.ipynb, cell 1",
        "+++ a b.ipynb, cell 1",
        "@@ -1,2 +1,2 @@",
        f"-!pip install {NSL} numpy",
        "+!pip install advreg numpy",
        " ",
        "--- a b.ipynb, cell 3",
        "+++ a b.ipynb, cell 3",
        "@@ -1,4 +1,5 @@",
        " %%time",
        " import os",
        " ",
        f"-import {NSL} as nsl, numpy as np",
        "+import numpy as np",
        "+from advreg import nsl",
        "--- a b.ipynb, cell 5",
        "+++ a b.ipynb, cell 5",
        "@@ -1,2 +1,2 @@",
    ]


def test_notebooks_without_nsl_stay_as_they_are():
    text = json.dumps(notebook("x = (", "%%bash\n!"))
    assert migrate_notebook(text) == migrate.Migration(text, text)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_diffs_keep_the_ends_of_lines(end):
    migration = migrate_python(f"import {NSL} as nsl{end}x = 1")
    assert migration.after == f"from advreg import nsl{end}x = 1"
    assert diff(migration, Path("a.py")) == (
        f"--- a.py\n+++ a.py\n@@ -1,2 +1,2 @@\n-import {NSL} as nsl{end}"
        f"+from advreg import nsl{end} x = 1\n\\ No newline at end of file\n"
    ).replace("nsl\r+", "nsl\n+").replace("nsl\r ", "nsl\n ")
    assert diff(migrate_python(""), Path("a.py")) == ""


@pytest.mark.parametrize(
    ("name", "data", "encoding"),
    [
        ("a.py", b"", "utf-8"),
        ("a.py", b"\xef\xbb\xbfx = '\xc3\xa4'\r\n\f\r", "utf-8-sig"),
        ("a.py", b"#!/bin/sh\n# coding: latin-1\nx = '\xe4'", "iso-8859-1"),
        ("a.ipynb", b"\xef\xbb\xbf{}", "utf-8-sig"),
        ("a.ipynb", b"\n# coding: latin-1\n\xc3\xa4", "utf-8"),
    ],
)
def test_files_are_written_back_as_they_were(tmp_path, name, data, encoding):
    path = tmp_path / name
    path.write_bytes(data)
    text, found = read(path)
    assert found == encoding
    path.write_bytes(b"other")
    path.chmod(0o754)
    write(path, text, found)
    assert path.read_bytes() == data
    assert stat.S_IMODE(path.stat().st_mode) == 0o754
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.py", b"x = '\xe4'"),
        ("a.py", b"# coding: unheard-of\n"),
        ("a.py", b"\xff\xfex\x00"),
        ("a.py", b"# coding: utf-7\nx = '+AOQ-'"),
        ("a.ipynb", b'"\xe4"'),
    ],
)
def test_files_in_no_known_encoding_are_errors(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match="encoding"):
        read(path)


def test_what_cannot_be_written_stays_as_it_is(tmp_path, monkeypatch):
    path = tmp_path / "a.py"
    path.write_text("before")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="read-only"):
        write(path, "after", "utf-8")
    path.chmod(0o644)
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        write(path, "after", "utf-8")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.py"]


def test_links_stay_links(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("before")
    (tmp_path / "link.py").symlink_to(path)
    write(tmp_path / "link.py", "after", "utf-8")
    assert (tmp_path / "link.py").is_symlink()
    assert path.read_text() == "after"


def test_folders_are_searched(tmp_path):
    for name in (
        "a.py",
        "b c/ä.ipynb",
        "b c/d.txt",
        ".hidden/x.py",
        "b c/.ipynb_checkpoints/x.ipynb",
        "__pycache__/x.py",
        "node_modules/x.py",
        "venv/pyvenv.cfg",
        "venv/lib/x.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "b c" / "up").symlink_to(tmp_path)
    (tmp_path / "b c" / "z.py").symlink_to(tmp_path / "a.py")
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    (tmp_path / "nowhere.py").symlink_to(tmp_path / "absent.py")
    os.mkfifo(tmp_path / "pipe.py")
    files, errors = find([tmp_path, tmp_path / ".hidden" / "x.py", tmp_path / "a.py"])
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        "a.py",
        "b c/ä.ipynb",
        ".hidden/x.py",
    ]
    assert [Path(error.filename).name for error in errors] == ["loop.py", "nowhere.py"]
