r"""
word2vec: rows of large tables
==============================

Each step updates only the rows of the words in a batch, with ``opt.step_rows``::

    python -m pip install matplotlib

The program trains skip-gram with negative sampling (Mikolov et al., 2013) on Python's
reference manual. The manual comes with Python, in ``pydoc_data.topics``, and has 64,000
words. There are two tables, each with a row of 32 numbers for each word. A batch uses some
rows of both tables. ``opt.step_rows`` takes the numbers of these rows, and a gradient for
each of them. If a row occurs several times, its gradients add up to :math:`g_r`. Each row
:math:`r` of the batch is updated, and no other row:

.. math::

    v_r &\leftarrow d \, v_r + (1 - d) \, g_r^2 \\
    p_r &\leftarrow p_r - \text{lr} \; g_r \, / \, (\sqrt{v_r} + \varepsilon)

This is called a lazy update. In a dense step, :math:`v` of all other rows decays too:
:math:`v_r \leftarrow d \, v_r`. So a rare word moves further when it occurs again.
"""

import re
import time
import tracemalloc
from collections import Counter
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import numpy as np
from fastrms import RMSProp

SIZE, BATCH, NEGATIVE, WINDOW, EPOCHS = 32, 256, 5, 4, 5

words = re.findall("[a-z]+", " ".join(topics.values()).lower())
counts = Counter(words)
vocabulary = [word for word, count in counts.most_common() if count >= 10]
index = {word: i for i, word in enumerate(vocabulary)}
text = np.array([index[word] for word in words if word in index])
frequency = np.array([counts[word] for word in vocabulary]) / len(text)
kept = np.minimum(1, np.sqrt(1e-3 / frequency))  # frequent words carry little information
noise = np.cumsum(frequency**0.75 / np.sum(frequency**0.75))

rng = np.random.default_rng(0)
shape = len(vocabulary), SIZE
opt = RMSProp(
    {
        "word": rng.uniform(-0.5, 0.5, shape).astype(np.float32) / SIZE,
        "context": np.zeros(shape, np.float32),
    },
    lr=lambda step: 0.002 * 0.9998**step,
)


def pairs():
    """Return pairs of words that are at most WINDOW apart, in random order."""
    some = text[rng.random(len(text)) < kept[text]]
    reach = rng.integers(1, WINDOW + 1, len(some))
    found = []
    for away in range(1, WINDOW + 1):
        near = np.flatnonzero(reach[:-away] >= away)
        found += [(some[near], some[near + away]), (some[near + away], some[near])]
    centre, context = np.concatenate(found, axis=1)
    order = rng.permutation(len(centre))
    return centre[order], context[order]


def gradients(centre, context):
    """Return rows of both tables, and the gradients of the loss for these rows."""
    drawn = np.searchsorted(noise, rng.random((len(centre), NEGATIVE)))
    contexts = np.column_stack([context, np.minimum(drawn, len(vocabulary) - 1)])
    word_rows = opt.params["word"][centre]
    context_rows = opt.params["context"][contexts]
    scores = np.matmul(context_rows, word_rows[:, :, None])[:, :, 0]
    error = 1 / (1 + np.exp(-scores))
    error[:, 0] -= 1  # the word in the text; the others were drawn at random
    word_gradient = np.matmul(error[:, None, :], context_rows)[:, 0]
    context_gradient = error[:, :, None] * word_rows[:, None, :]
    return (centre, word_gradient), (contexts.ravel(), context_gradient.reshape(-1, SIZE))


for _ in range(EPOCHS):
    centres, contexts = pairs()
    for start in range(0, len(centres) - BATCH + 1, BATCH):
        some = slice(start, start + BATCH)
        of_words, of_contexts = gradients(centres[some], contexts[some])
        opt.step_rows("word", *of_words)
        opt.step_rows("context", *of_contexts)

unit = opt.params["word"] / np.linalg.norm(opt.params["word"], axis=1, keepdims=True)


def nearest(word):
    order = np.argsort(-(unit @ unit[index[word]]))
    return [vocabulary[i] for i in order[1:6]]


print(f"{len(text)} words, {len(vocabulary)} different, {opt.steps} steps")
for word in ("except", "integer", "keyword"):
    print(f"{word}: {' '.join(nearest(word))}")


# %%
# The 40 words that follow the 40 most frequent ones, along the two directions in which all
# words differ most. Words that occur in the same places are near each other.

_, _, directions = np.linalg.svd(unit - unit.mean(axis=0), full_matrices=False)
points = unit[40:80] @ directions[:2].T
figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
axes.plot(*points.T, ".", color="#0072B2")
for word, point in zip(vocabulary[40:80], points, strict=True):
    axes.annotate(word, point, (3, 2), textcoords="offset points", fontsize=8)
axes.axis("off")
plt.show()

# %%
# The last batch again, with a larger table: check the rule, and measure time and memory.

rows, gradient = of_contexts
large = RMSProp({"table": np.zeros((100_000, SIZE), np.float32)})
large.step_rows("table", rows, gradient)
touched, where = np.unique(rows, return_inverse=True)
g = np.zeros((len(touched), SIZE), np.float32)
np.add.at(g, where, gradient)
p = -0.001 * g / (np.sqrt((1 - 0.9) * g**2) + 1e-8)  # v and p were 0
print(f"the rule above: {np.array_equal(large.params['table'][touched], p)}", end=", ")
print(f"other rows moved: {np.delete(large.params['table'], touched, axis=0).any()}")


def dense():
    whole = np.zeros_like(large.params["table"])
    np.add.at(whole, rows, gradient)
    large.step({"table": whole})


def measured(step):
    times = []
    for _ in range(9):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    tracemalloc.start()
    step()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return f"{1e3 * sorted(times)[4]:.2f} ms, {most / 1e6:.1f} MB"


on_rows = measured(lambda: large.step_rows("table", rows, gradient))
print(f"{len(touched)} of 100000 rows: {on_rows}; a dense step: {measured(dense)}")
