"""What many people begin with: `first_step` counts how long it takes from its start to the end of its first step."""

import sys
import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

images, labels = (torch.from_numpy(np.load(path)) for path in sys.argv[1:3])
loader = DataLoader(TensorDataset((images.float() / 255 - 0.1307) / 0.3081, labels), batch_size=128, shuffle=True)
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for image, label in loader:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(image), label)
    loss.backward()
    optimizer.step()
    print(time.time(), flush=True)
    break
