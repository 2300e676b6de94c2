"""The programs: the demo, the explorer, and the command `advreg`.

Nothing in the library imports this room. It uses the library as a user would. Names of
datasets and files of models come in. Tables, figures, reports and a page come out.
Read in this order:

- `recipes`: the networks, and the settings that suit each dataset.
- `settings`: the settings of the demo.
- `demo`: trains a network plainly and with adversarial training, and attacks both.
- `explorer`: a page that shows predictions under attack.
- `cli`: the command line, with a sub-command for each of these.

`recipes`, `settings` and the parsers of `cli` import neither Keras nor TensorFlow when
they are imported, so that the command's help is fast.
"""
