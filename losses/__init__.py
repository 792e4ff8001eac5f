"""Pure functions of tensors: every term of DINO, EsViT and CMD, and their weighted sum.

from losses import Objective
objective = Objective("cmd")
centres = objective.make_centres(prototypes=65536)
total, terms, entropy = objective(student_views, teacher_views, centres, teacher_temp=0.04)
"""

from losses.objective import Objective
from losses.targets import Centres

__all__ = ["Centres", "Objective"]
