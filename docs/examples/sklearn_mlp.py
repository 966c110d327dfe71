"""Train scikit-learn's MLPClassifier with fastrms, through its public API.

    python -m pip install scikit-learn

scikit-learn does not tell its gradients. But one `partial_fit` on one batch, with
`solver="sgd"`, rate 1, and neither momentum nor penalty, takes exactly one step
``p = p - gradient``: what it took off *is* the gradient, up to a rounding of p. So each
step here lets it take that step and reads the gradient, and then puts back the weights
and takes fastrms's step instead. Nothing private is used: `partial_fit`, and the fitted
attributes `coefs_` and `intercepts_`, to which it assigns.

What this gives: RMSProp, with all options of fastrms, for a model that keeps `predict`,
`score` and pipelines. What it does not: `fit`, early stopping and the penalty `alpha`,
which belong to scikit-learn's own loop (use `weight_decay` of fastrms). A step costs what
`partial_fit` costs, about a millisecond, so this is for trying RMSProp, not for speed.
"""

import numpy as np
from fastrms import RMSProp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

BATCH = 64

x, y = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(
    x / 16, y, test_size=0.2, random_state=0, stratify=y
)

model = MLPClassifier(
    (64,),
    solver="sgd",
    learning_rate_init=1.0,
    momentum=0.0,
    alpha=0.0,
    batch_size=BATCH,
    random_state=0,
)
# Draws the weights, and takes a first step, which does no harm.
model.partial_fit(train_x[:BATCH], train_y[:BATCH], classes=np.unique(y))

opt = RMSProp({"coefs": model.coefs_, "intercepts": model.intercepts_}, lr=2e-3)
# Now the model computes with the optimizer's views, and what fastrms changes, it sees.
model.coefs_, model.intercepts_ = opt.params["coefs"], opt.params["intercepts"]
params, grads = opt.buffers["params"].flat, opt.buffers["grads"].flat


def gradient(rows_x, rows_y):
    """Write the gradient of the loss on these rows to `opt.grads`; weights stay."""
    before = params.copy()
    model.partial_fit(rows_x, rows_y)
    np.subtract(before, params, out=grads)
    params[:] = before


# Is it the gradient? Compare a few elements with differences of the loss, which
# `predict_proba` gives.
def loss(rows_x, rows_y):
    return -np.mean(np.log(model.predict_proba(rows_x)[np.arange(len(rows_y)), rows_y]))


gradient(train_x[:BATCH], train_y[:BATCH])
worst = 0.0
for element in np.random.default_rng(0).choice(params.size, 20, replace=False):
    start, differences = params[element], []
    for step in (1e-5, -1e-5):
        params[element] = start + step
        differences.append(loss(train_x[:BATCH], train_y[:BATCH]))
    params[element] = start
    worst = max(worst, abs((differences[0] - differences[1]) / 2e-5 - grads[element]))
print(f"gradients are within {worst:.1e} of finite differences")
assert worst < 1e-7

rng = np.random.default_rng(0)
for _ in range(30):
    order = rng.permutation(len(train_y))
    # Whole batches: `batch_size` is fixed in the model.
    for start in range(0, len(order) - BATCH + 1, BATCH):
        rows = order[start : start + BATCH]
        gradient(train_x[rows], train_y[rows])
        opt.step()

accuracy = model.score(test_x, test_y)
print(f"{opt.steps} steps, test accuracy {accuracy:.3f}")
assert accuracy > 0.95
