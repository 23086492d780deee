"""How much accuracy each way to quantize keeps: Spearman correlation on the STS benchmark, and distance from float."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from contenders import SEQUENCE, Built, Contender, Failure, Feed, Workspace, build, run_child, save_feeds
from preparation import *
