"""Distil a large open reasoning model into a small, ultra-sparse mixture-of-experts student.

Rooms import downwards only: `cli` > `stages` > `evals`, `export` > `train`, `rollouts` >
`data`, `models`, `losses`, `optim`, `teachers` > `storage`, `kernels` > the words everyone shares
(`batch`, `config`, `errors`, `head`, `spans`, `vocabulary`).
"""

__version__ = "0.1.0"
