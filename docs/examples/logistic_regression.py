"""Logistic regression in plain NumPy.

    python -m pip install scikit-learn      # for the data

Of 569 tumours it says which are malignant, from 30 measurements each. Gradients are
written straight into the optimizer's buffer.
"""

import numpy as np
from fastrms import RMSProp
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

x, y = load_breast_cancer(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(
    x, y, test_size=0.25, random_state=0, stratify=y
)
mean, deviation = train_x.mean(axis=0), train_x.std(axis=0)
train_x, test_x = (train_x - mean) / deviation, (test_x - mean) / deviation

opt = RMSProp(
    {"w": np.zeros(30), "b": np.zeros(())},
    lr=lambda step: 0.03 * 0.1 ** (step / 300),  # from 0.03 at first to 0.003 at last
    weight_decay=1e-3,
)
w, b = opt.params["w"], opt.params["b"]
dw, db = opt.grads["w"], opt.grads["b"]


def probability(x):
    return 1 / (1 + np.exp(-(x @ w + b)))


for _ in range(300):
    error = (probability(train_x) - train_y) / len(train_y)
    np.matmul(train_x.T, error, out=dw)
    np.sum(error, out=db)
    opt.step()

likelihood = np.where(test_y == 1, probability(test_x), 1 - probability(test_x))
loss = -np.log(likelihood).mean()
accuracy = np.mean((probability(test_x) > 0.5) == test_y)
print(f"{opt.steps} steps, test loss {loss:.4f}, test accuracy {accuracy:.3f}")
assert accuracy > 0.94
assert loss < 0.15
