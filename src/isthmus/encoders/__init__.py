"""Pixels, sound, brain signals, tokens → features: one architecture a file.

Importing this package registers our image architectures with timm.
"""

from isthmus.encoders.images import alexnet as alexnet
from isthmus.encoders.images import convit as convit
from isthmus.encoders.images import ffnet as ffnet
from isthmus.encoders.images import hornet as hornet
from isthmus.encoders.images import inceptionnext as inceptionnext
from isthmus.encoders.images import metamixer as metamixer
from isthmus.encoders.images import nin as nin
from isthmus.encoders.images import replknet as replknet
from isthmus.encoders.images import resnet_cifar as resnet_cifar
from isthmus.encoders.images import transnext as transnext
from isthmus.encoders.images import unireplknet as unireplknet
