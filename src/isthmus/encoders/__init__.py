"""Pixels, sound, brain signals, tokens → features: one architecture a file.

Importing this package registers our image architectures with timm.
"""

from isthmus.encoders import alexnet as alexnet
from isthmus.encoders import convit as convit
from isthmus.encoders import ffnet as ffnet
from isthmus.encoders import hornet as hornet
from isthmus.encoders import inceptionnext as inceptionnext
from isthmus.encoders import metamixer as metamixer
from isthmus.encoders import nin as nin
from isthmus.encoders import replknet as replknet
from isthmus.encoders import resnet_cifar as resnet_cifar
from isthmus.encoders import transnext as transnext
from isthmus.encoders import unireplknet as unireplknet
