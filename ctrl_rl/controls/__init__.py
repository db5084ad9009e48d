"""Kinds of controls: one of several labels, or a number in an interval.

Every control has a null value, which asks for nothing and is called "any": the index after the last
label, or NaN.
"""

from ctrl_rl.controls.categorical import Categorical as Categorical
from ctrl_rl.controls.categorical import check_label_names as check_label_names
from ctrl_rl.controls.categorical import check_same_labels as check_same_labels
from ctrl_rl.controls.categorical import distinct as distinct
from ctrl_rl.controls.continuous import Continuous as Continuous
from ctrl_rl.controls.control import ANY as ANY
from ctrl_rl.controls.control import Control as Control
from ctrl_rl.controls.control import Value as Value
from ctrl_rl.controls.control import Values as Values
from ctrl_rl.controls.read import as_control as as_control
from ctrl_rl.controls.read import described as described
