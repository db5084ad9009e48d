"""Offline pairs (x, y): datasets and their sources."""

from ctrl_rl.data.arrays import array_dataset as array_dataset
from ctrl_rl.data.digits import digits_dataset as digits_dataset
from ctrl_rl.data.faces import faces_dataset as faces_dataset
from ctrl_rl.data.hugging_face import hugging_face_dataset as hugging_face_dataset
from ctrl_rl.data.images import image_dataset as image_dataset
from ctrl_rl.data.offline import OfflineDataset as OfflineDataset
from ctrl_rl.data.offline import as_float as as_float
from ctrl_rl.data.splits import DEFAULT_FRACTIONS as DEFAULT_FRACTIONS
