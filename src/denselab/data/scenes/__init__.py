"""Rendered street scenes with exact truth: classes, instances, depth, normals, boxes, camera, tracks."""

from denselab.data.scenes.render import Instance as Instance
from denselab.data.scenes.render import Scene as Scene
from denselab.data.scenes.render import render_clip as render_clip
from denselab.data.scenes.render import render_scene as render_scene
from denselab.data.scenes.world import Mount as Mount
from denselab.data.scenes.write import write_scenes as write_scenes
