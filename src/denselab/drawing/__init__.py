"""Pictures of results: colours over an image, legends, a contact sheet. Huge images are painted band by band."""

from denselab.drawing.canvas import paint as paint
from denselab.drawing.depth import depth_overlay as depth_overlay
from denselab.drawing.legend import legend as legend
from denselab.drawing.normals import normal_colours as normal_colours
from denselab.drawing.normals import normals_overlay as normals_overlay
from denselab.drawing.segments import Tag as Tag
from denselab.drawing.segments import segments_overlay as segments_overlay
from denselab.drawing.segments import shades as shades
from denselab.drawing.semantic import blend as blend
from denselab.drawing.semantic import overlay as overlay
from denselab.drawing.sheet import contact_sheet as contact_sheet
