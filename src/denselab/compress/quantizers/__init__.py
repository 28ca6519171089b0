"""Quantizers: frozen parameters, and two pure functions between numbers and integer codes.

`codes(x)` are int32, from 0 to levels - 1, or around 0 where the quantizer is symmetric; `values(codes)` are the
numbers they stand for, in the dtype of the parameters, which is also the dtype that is computed with. Parameters
broadcast to the data: their shape alone says per tensor ([]), per channel or per head. No width passes a number
through: 8 bits are 256 levels.
"""

from denselab.compress.quantizers.adalog import AdaLog as AdaLog
from denselab.compress.quantizers.checks import check_finite as check_finite
from denselab.compress.quantizers.logarithm import Log2 as Log2
from denselab.compress.quantizers.logarithm import LogSqrt2 as LogSqrt2
from denselab.compress.quantizers.logarithm import ZeroCode as ZeroCode
from denselab.compress.quantizers.quantizer import Quantizer as Quantizer
from denselab.compress.quantizers.quantizer import code_bits as code_bits
from denselab.compress.quantizers.quantizer import fake_quantized as fake_quantized
from denselab.compress.quantizers.quantizer import parameter_shape as parameter_shape
from denselab.compress.quantizers.quantizer import quantized as quantized
from denselab.compress.quantizers.reparameterize import ChannelFold as ChannelFold
from denselab.compress.quantizers.reparameterize import bias_without_shift as bias_without_shift
from denselab.compress.quantizers.reparameterize import channel_fold as channel_fold
from denselab.compress.quantizers.reparameterize import folded_norm as folded_norm
from denselab.compress.quantizers.reparameterize import folded_reader as folded_reader
from denselab.compress.quantizers.sulq import Sulq as Sulq
from denselab.compress.quantizers.tanq import TanQ as TanQ
from denselab.compress.quantizers.ternary import Ternary as Ternary
from denselab.compress.quantizers.uniform import Uniform as Uniform
from denselab.compress.quantizers.uniform import lsq_scale as lsq_scale
