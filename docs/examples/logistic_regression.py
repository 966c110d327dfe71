"""
Logistic regression in plain NumPy
==================================

Of 569 tumours, the model predicts which are malignant, from 30 measurements each. NumPy
writes the gradients straight into the optimizer's buffer, so that no gradient is copied::

    python -m pip install matplotlib scikit-learn

The learning rate falls from 0.03 to 0.003, and the weights decay.
"""

import matplotlib.pyplot as plt
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

# %%
# The predictions for the tumours that the model has not seen in training:

predicted = probability(test_x)
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.hist(
    [predicted[test_y == 0], predicted[test_y == 1]],
    bins=20,
    color=["#D55E00", "#0072B2"],
    label=["malignant", "benign"],
)
axes.set(xlabel="predicted probability that the tumour is benign", ylabel="tumours")
axes.legend(frameon=False)
plt.show()
