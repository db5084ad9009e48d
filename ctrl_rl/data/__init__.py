"""Offline pairs (x, y): datasets and their sources."""

from ctrl_rl.data.faces import faces_dataset as faces_dataset
from ctrl_rl.data.offline import DEFAULT_FRACTIONS as DEFAULT_FRACTIONS
from ctrl_rl.data.offline import OfflineDataset as OfflineDataset
from ctrl_rl.data.offline import as_float as as_float
from ctrl_rl.data.sources import array_dataset as array_dataset
from ctrl_rl.data.sources import digits_dataset as digits_dataset
from ctrl_rl.data.sources import image_dataset as image_dataset
