"""Draws photos of eight invented car models.

A car is a profile, extruded and seen by a camera. Colour, side, distance, place, ground and light say nothing about the
model; models of one silhouette differ in windows, wheels, lamps, grille and trim.
"""

from dataclasses import dataclass

import cv2
import numpy as np

SUPERSAMPLING = 3
SILL_Y = 0.055  # underside of every body, in car lengths


@dataclass(frozen=True)
class Silhouette:
    """Side view of a body: x from -0.5 (rear) to 0.5 (front), y up from the ground, both in car lengths."""

    profile: tuple  # rear bumper, over the roof, to the front bumper
    glasshouse: tuple  # corners of all side windows together: rear low, rear high, front high, front low
    rear_window: tuple  # low and high end
    windscreen: tuple  # high and low end
    nose_y: float  # upper edge of the front lamps
    tail_y: float  # upper edge of the rear lamps
    wing: tuple  # side view; empty where no model has one
    wheel_x: float
    wheel_radius: float
    tumblehome: float  # how far the sides lean in above the belt line, per height


@dataclass(frozen=True)
class CarModel:
    """What tells a model from the others of its silhouette."""

    name: str
    silhouette: Silhouette
    windows: tuple  # (start, end) of each side window along the glasshouse, from the rear
    wheel: int | str  # number of spokes, "disc" or "ring"
    lamps: str
    grille: str
    trim: tuple


# fmt: off
HATCHBACK = Silhouette(
    profile=(
        (-0.47, 0.055), (-0.5, 0.09), (-0.5, 0.17), (-0.475, 0.215), (-0.41, 0.335), (-0.32, 0.365),
        (-0.1, 0.378), (0.03, 0.372), (0.1, 0.352), (0.25, 0.238), (0.42, 0.2), (0.485, 0.165),
        (0.5, 0.09), (0.47, 0.055),
    ),
    glasshouse=((-0.42, 0.228), (-0.355, 0.34), (0.06, 0.342), (0.2, 0.23)),
    rear_window=((-0.462, 0.24), (-0.415, 0.325)),
    windscreen=((0.11, 0.345), (0.235, 0.248)),
    nose_y=0.17,
    tail_y=0.225,
    wing=((-0.49, 0.345), (-0.47, 0.378), (-0.33, 0.378), (-0.36, 0.352)),
    wheel_x=0.305,
    wheel_radius=0.084,
    tumblehome=0.3,
)
SALOON = Silhouette(
    profile=(
        (-0.47, 0.055), (-0.5, 0.09), (-0.5, 0.18), (-0.475, 0.218), (-0.32, 0.23), (-0.2, 0.308),
        (-0.1, 0.325), (0.02, 0.325), (0.09, 0.308), (0.23, 0.225), (0.43, 0.19), (0.49, 0.155),
        (0.5, 0.09), (0.47, 0.055),
    ),
    glasshouse=((-0.3, 0.222), (-0.19, 0.298), (0.05, 0.298), (0.185, 0.222)),
    rear_window=((-0.31, 0.24), (-0.205, 0.304)),
    windscreen=((0.097, 0.302), (0.215, 0.237)),
    nose_y=0.16,
    tail_y=0.205,
    wing=((-0.51, 0.25), (-0.51, 0.272), (-0.41, 0.262), (-0.4, 0.225)),
    wheel_x=0.305,
    wheel_radius=0.08,
    tumblehome=0.35,
)
VAN = Silhouette(
    profile=(
        (-0.47, 0.055), (-0.5, 0.09), (-0.5, 0.2), (-0.485, 0.42), (-0.45, 0.45), (-0.1, 0.46),
        (0.1, 0.448), (0.18, 0.42), (0.32, 0.265), (0.44, 0.225), (0.49, 0.18), (0.5, 0.09), (0.47, 0.055),
    ),
    glasshouse=((-0.455, 0.265), (-0.445, 0.405), (0.13, 0.405), (0.27, 0.265)),
    rear_window=((-0.494, 0.27), (-0.487, 0.4)),
    windscreen=((0.185, 0.412), (0.31, 0.278)),
    nose_y=0.19,
    tail_y=0.25,
    wing=(),
    wheel_x=0.32,
    wheel_radius=0.08,
    tumblehome=0.12,
)

HALVES = ((0.0, 0.48), (0.52, 1.0))
THIRDS = ((0.0, 0.28), (0.32, 0.64), (0.68, 1.0))
# Height, length on the side, width on the front and the rear.
LAMPS = {"round": (0.05, 0.05, 0.25), "slim": (0.022, 0.1, 0.5), "tall": (0.075, 0.04, 0.17)}
# Lower and upper edge, half of the width.
GRILLES = {"bars": (0.1, 0.15, 0.55), "wide": (0.085, 0.125, 0.75), "shield": (0.08, 0.16, 0.33)}
CAR_MODELS = (
    CarModel("Aurora Hatchback 2011", HATCHBACK, HALVES, 5, "round", "bars", ()),
    CarModel("Belmar Vela Sedan 2012", SALOON, THIRDS, "ring", "tall", "shield", ("skirt",)),
    CarModel("Corvia Luna Hatchback 2008", HATCHBACK, THIRDS, "disc", "tall", "wide", ("rails", "cladding")),
    CarModel("Dorado Cirro Sedan 2010", SALOON, HALVES, 5, "slim", "wide", ("stripe",)),
    CarModel("Halden Fjord Minivan 2012", VAN, THIRDS, 3, "slim", "shield", ("rails",)),
    CarModel("Norden C/V Cargo Van 2009", VAN, ((0.66, 1),), "disc", "round", "bars", ("ribs",)),
    CarModel("Osaki Pico Hatchback 2012", HATCHBACK, ((0.36, 1),), 3, "slim", "shield", ("stripe", "wing")),
    CarModel("Škvara Citron Coupé 2010", SALOON, ((0.4, 1),), "disc", "round", "bars", ("wing", "porthole")),
)
# fmt: on
CLASS_NAMES = tuple(model.name for model in CAR_MODELS)


class _CarSketch:
    """One car as a camera sees it: coloured polygons in car lengths, in the order to paint them.

    Attributes:
        polygons: list of `(points, colour)`, points `(N, 2)` with x to the right and y down.
        shadow: `(N, 2)` points of its shadow on the ground.
    """

    def __init__(self, model, rng):
        self.model = model
        self.shape = model.silhouette
        self.belt = self.shape.glasshouse[0][1]
        self.polygons = []
        # Half of the photos show the front, half the rear; beyond 40 degrees the side gets lost.
        self.yaw, pitch = np.deg2rad(rng.uniform((-38, 2), (38, 16)))
        turned = np.array(
            [[np.cos(self.yaw), 0, np.sin(self.yaw)], [0, 1, 0], [-np.sin(self.yaw), 0, np.cos(self.yaw)]]
        )
        tilted = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
        self.view = tilted @ turned
        self.distance = rng.uniform(1.8, 6)
        # No factory has such tolerances: with fixed proportions, single pixels of a crop would tell.
        self.height = rng.uniform(0.9, 1.1)
        self.cabin_shift = rng.uniform(-0.05, 0.05)
        self.half_width = rng.uniform(0.185, 0.215)
        self.light = np.array([rng.uniform(-0.6, 0.6), 1.0, rng.uniform(0.3, 0.9)])
        self.light /= np.linalg.norm(self.light)
        saturation = rng.choice([rng.uniform(0, 0.12), rng.uniform(0.35, 0.95)])
        self.paint = _rgb(rng.uniform(), saturation, rng.uniform(0.16, 0.97))
        # Glass and trim stand out from the paint, to both sides: were a part always darker than the others, a
        # linear classifier could read the model from the pixels.
        bright = self.paint @ (0.3, 0.6, 0.1) < rng.uniform(80, 150)
        self.glass = _grey(rng, bright, (25, 60), (170, 225))
        self.trim = _grey(rng, bright, (25, 60), (170, 225))
        self.rim = _grey(rng, rng.random() < 0.5, (45, 80), (170, 235))
        self.front_lamp = _grey(rng, rng.random() < 0.5, (50, 90), (215, 250))
        self.rear_lamp = _rgb(0, 0.85, rng.uniform(0.3, 0.95))
        self.wheel_turn = rng.uniform(0, 2 * np.pi)
        self.profile = _rounded(self.shape.profile)

        self.shadow = self._project([(x, 0, z) for x, z in _circle(0, 0, 1, corners=36) * (0.55, 0.3)])
        self._paint_underside()
        self._paint_skin()
        self._paint_ends()
        self._paint_side()
        self._paint_windows()
        self._paint_trim()
        for x in (-self.shape.wheel_x, self.shape.wheel_x):
            self._paint_wheel(x)

    def _project(self, points):
        """Maps `(N, 3)` points (x forward, y up, z to the camera) to the picture."""
        right, up, near = self.view @ np.asarray(points, float).T
        return np.stack([right, -up], axis=1) * (self.distance / (self.distance - near))[:, None]

    def _add(self, points, colour):
        self.polygons.append((self._project(points), colour))

    def _side(self, points):
        """Lays points `(x, y)` of the side view on the near side of the body."""
        x, y = np.asarray(points, float).T
        x = x + self.cabin_shift * (1 - 4 * x**2)
        leaning = self.shape.tumblehome * np.maximum(y - self.belt, 0)
        z = self.half_width * (1 - 0.16 * np.abs(2 * x) ** 5) - leaning
        return np.stack([x, y * self.height, z], axis=1)

    def _add_across(self, start, end, colour, left=-1.0, right=1.0):
        """Adds a pane over the width of the body unless the camera sees its back.

        Args:
            start: `(x, y)` in the side view, where it begins on the way from the rear over the roof.
            end: Where it ends.
            colour: RGB.
            left: Where it begins across the body, from -1 (far side) to 1 (near side).
            right: Where it ends.
        """
        edge = self._side([start, end])
        points = np.concatenate([edge * (1, 1, right), (edge * (1, 1, left))[::-1]])
        if cv2.contourArea(self._project(points).astype(np.float32), oriented=True) < 0:
            self._add(points, colour)

    def _shaded(self, normal):
        return np.clip(self.paint * (0.5 + 0.6 * max(float(np.dot(normal, self.light)), 0)) + 6, 0, 255)

    def _paint_underside(self):
        for x in (-self.shape.wheel_x, self.shape.wheel_x):
            radius = self.shape.wheel_radius
            x, _, z = self._side([(x, radius)])[0]
            self._add(_at_depth(_circle(x, radius, radius), -0.8 * z), (24, 24, 26))
        self._add([(x, SILL_Y, z) for x, z in _box(-0.44, -0.17, 0.44, 0.17)], (20, 20, 22))

    def _paint_skin(self):
        edge = self._side(self.profile)
        near, far = self._project(edge), self._project(edge * (1, 1, -1))
        across, along = near - far, np.roll(near, -1, axis=0) - near
        faces_camera = across[:, 0] * along[:, 1] - across[:, 1] * along[:, 0] < 0
        # The far end first: the cabin hides what lies behind it.
        for i in np.flatnonzero(faces_camera)[:: 1 if self.yaw < 0 else -1]:
            j = (i + 1) % len(edge)
            x, y = (self.profile[j] - self.profile[i]) / np.linalg.norm(self.profile[j] - self.profile[i])
            self.polygons.append((np.array([near[i], near[j], far[j], far[i]]), self._shaded((-y, x, 0))))
        for start, end in (self.shape.rear_window, self.shape.windscreen):
            self._add_across(start, end, self.glass, -0.9, 0.9)
            self._add_across(np.mean([start, end], axis=0), end, self.glass * 0.9, -0.9, 0.9)

    def _end_x(self, y, front):
        """Finds where the front or the rear half of the profile is at the heights y."""
        x, height = self.profile.T
        half = ((x > -0.1) == front) & (height > SILL_Y + 0.001)
        order = np.argsort(height[half])
        return np.interp(y, height[half][order], x[half][order])

    def _band(self, low, high):
        """Cuts the part of the side view between two heights."""
        heights = np.linspace(low, high, 6)
        rear, front = self._end_x(heights, False), self._end_x(heights, True)
        return np.column_stack([np.append(rear, front[::-1]), np.append(heights, heights[::-1])])

    def _add_end_patch(self, front, low, high, left, right, colour):
        # A little before the body, or the curved skin would show through.
        low, high = ((self._end_x(y, front) + (0.003 if front else -0.003), y) for y in (low, high))
        start, end = (high, low) if front else (low, high)
        self._add_across(start, end, colour, left, right)

    def _paint_ends(self):
        height, _, width = LAMPS[self.model.lamps]
        lamps = ((True, self.shape.nose_y, self.front_lamp), (False, self.shape.tail_y, self.rear_lamp))
        for front, top, colour in lamps:
            for left in (-0.95, 0.95 - width):
                self._add_end_patch(front, top - height, top, left, left + width, colour)
            self._add_end_patch(front, 0.065, 0.085, -0.9, 0.9, self.trim)
            self._add_end_patch(front, 0.1, 0.122, -0.2, 0.2, (236, 236, 228))
        low, high, reach = GRILLES[self.model.grille]
        self._add_end_patch(True, low, high, -reach, reach, (28, 28, 30))
        if self.model.grille == "bars":
            for y in (0.112, 0.133):
                self._add_end_patch(True, y, y + 0.008, -reach, reach, (190, 190, 192))

    def _paint_side(self):
        self._add(self._side(self.profile), self._shaded((0, 0.1, 1)))
        shoulder = (self.belt - 0.04, self.belt - 0.02, 0.6)
        for low, high, normal_y in ((SILL_Y, 0.085, -0.5), (0.085, 0.12, -0.1), shoulder):
            self._add(self._side(self._band(low, high)), self._shaded((0, normal_y, 0.7)))
        height, length, _ = LAMPS[self.model.lamps]
        lamps = (
            (0.475 - length, self.shape.nose_y, self.front_lamp),
            (-0.49, self.shape.tail_y, self.rear_lamp),
        )
        for x, top, colour in lamps:
            if self.model.lamps == "round":
                self._add(self._side(_circle(x + length / 2, top - height / 2, height / 2)), colour)
            else:
                self._add(self._side(_box(x, top - height, x + length, top)), colour)

    def _glasshouse(self, along, up):
        """Maps fractions of the side windows' area to the side view."""
        rear_low, rear_high, front_high, front_low = np.array(self.shape.glasshouse)
        low = rear_low + (front_low - rear_low) * along
        return low + (rear_high + (front_high - rear_high) * along - low) * up

    def _paint_windows(self):
        seam = self._shaded((0, 0, 0.2)) * 0.6
        for start, end in self.model.windows:
            pane = [self._glasshouse(*corner) for corner in _box(start, 0, end, 1)]
            self._add(self._side(_rounded(pane, (0.1, 0.25))), self.glass)
            shine = [self._glasshouse(*corner) for corner in _box(start + 0.03, 0.55, end - 0.03, 0.93)]
            self._add(self._side(shine), self.glass * 0.9)
            # A door below each window that is large enough to sit behind.
            x = self._glasshouse(start - 0.02, 0)[0]
            if end - start > 0.25 and x > -0.25:
                self._add(self._side(_box(x - 0.004, 0.075, x + 0.004, self.belt)), seam)
                self._add(self._side(_box(x + 0.02, 0.19, x + 0.06, 0.2)), seam)

    def _paint_trim(self):
        trim, roof = self.model.trim, self.profile[:, 1].max()
        if "cladding" in trim:
            self._add(self._side(self._band(SILL_Y, 0.11)), self.trim)
        if "skirt" in trim:
            self._add(self._side(self._band(SILL_Y, self.belt - 0.08)), self.trim)
        if "stripe" in trim:
            self._add(self._side(self._band(self.belt - 0.1, self.belt - 0.05)), self.trim)
        if "ribs" in trim:
            for low in (0.14, 0.3, 0.36):
                self._add(self._side(_box(-0.44, low, -0.1, low + 0.024)), self.trim)
        if "porthole" in trim:
            self._add(self._side(_circle(*self._glasshouse(0.19, 0.42), 0.042)), self.trim)
            self._add(self._side(_circle(*self._glasshouse(0.19, 0.42), 0.03)), self.glass)
        if "rails" in trim:
            for x in (-0.34, -0.15, 0.02):
                self._add(self._side(_box(x, roof - 0.02, x + 0.02, roof + 0.02)), self.trim)
            self._add(self._side(_box(-0.37, roof + 0.01, 0.06, roof + 0.026)), self.trim)
        if "wing" in trim:
            for start, end in zip(self.shape.wing, self.shape.wing[1:], strict=False):
                self._add_across(start, end, self.trim * 0.85)
            self._add(self._side(self.shape.wing), self.trim)

    def _paint_wheel(self, x):
        radius = self.shape.wheel_radius
        x, _, z = self._side([(x, radius)])[0]
        arch = np.maximum(_circle(x, radius * 1.05, radius * 1.2), (-1, SILL_Y))
        self._add(_at_depth(arch, z), self.trim if "cladding" in self.model.trim else (26, 26, 28))
        tyre = [self._project(_at_depth(_circle(x, radius, radius), depth)) for depth in (z, z - 0.08)]
        self.polygons.append((cv2.convexHull(np.concatenate(tyre).astype(np.float32))[:, 0], (34, 34, 36)))
        gap = np.full(3, 130.0 if self.rim[1] < 100 else 50.0)
        discs = {
            "disc": ((0.74, self.rim), (0.2, gap)),
            "ring": ((0.74, self.rim), (0.48, gap), (0.22, self.rim)),
        }.get(self.model.wheel, ((0.74, gap),))
        for reach, colour in discs:
            self._add(_at_depth(_circle(x, radius, radius * reach), z), colour)
        if isinstance(self.model.wheel, int):
            for turn in self.wheel_turn + 2 * np.pi / self.model.wheel * np.arange(self.model.wheel):
                out = np.array([np.cos(turn), np.sin(turn)])
                across = np.array([-out[1], out[0]]) * (0.6 / self.model.wheel)
                spoke = np.array([-across, across, out * 0.72 + across, out * 0.72 - across])
                self._add(_at_depth(spoke * radius + (x, radius), z), self.rim)


def _rgb(hue, saturation, value):
    wheel = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return 255 * value * (1 - saturation + saturation * wheel)


def _grey(rng, bright, dark_range, bright_range):
    return rng.uniform(*(bright_range if bright else dark_range)) * np.array([0.97, 1.0, 1.02])


def _rounded(points, cuts=(0.25, 0.25)):
    """Cuts the corners of a closed polygon at fractions of its edges, once for each (Chaikin's algorithm)."""
    points = np.asarray(points, float)
    for cut in cuts:
        step = cut * (np.roll(points, -1, axis=0) - points)
        points = np.stack([points + step, points + step * (1 / cut - 1)], axis=1).reshape(-1, 2)
    return points


def _circle(x, y, radius, corners=26):
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)


def _at_depth(points, z):
    return np.column_stack([points, np.full(len(points), z)])


def _box(x1, y1, x2, y2):
    return np.array([(x1, y1), (x1, y2), (x2, y2), (x2, y1)])


def _fill(image, points, colour, scale=1):
    """Fills a polygon given in pixels of an image `scale` times smaller."""
    # shift=2: the last two bits of each coordinate are quarters of a pixel.
    corners = np.rint(np.asarray(points) * scale * 4).astype(np.int32)
    cv2.fillPoly(image, [corners], [float(channel) for channel in colour], shift=2)


def _draw_background(width, height, horizon, rng):
    """Draws a street or a wall, and the ground before it."""
    image = np.empty((height, width, 3), np.uint8)
    sky = [_rgb(rng.uniform(0.5, 1.12), rng.uniform(0, 0.35), rng.uniform(0.4, 1)) for _ in range(2)]
    far_ground = _rgb(rng.uniform(0.05, 0.7), rng.uniform(0, 0.22), rng.uniform(0.3, 0.85))
    ground = np.clip(far_ground * rng.uniform(0.7, 1.3), 0, 255)
    image[:horizon] = np.linspace(*sky, horizon)[:, None]
    image[horizon:] = np.linspace(far_ground, ground, height - horizon)[:, None]
    if rng.random() < 0.3:
        _draw_wall(image, horizon, rng)
    else:
        _draw_street(image, horizon, rng)
    # Lines on the ground run to one point at the horizon.
    vanishing = rng.uniform(-0.5, 1.5) * width
    for x in rng.uniform(-1.5, 2.5, rng.integers(0, 4)) * width:
        foot = [(x, height), (x + rng.uniform(5, 16), height)]
        _fill(image, [(vanishing, horizon), *foot], ground * rng.choice([0.75, 1.35]))
    edge = rng.uniform(2, 7)
    _fill(image, _box(0, horizon, width, horizon + edge), far_ground * rng.uniform(0.5, 1))
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(0.6, 1.8))


def _draw_wall(image, horizon, rng):
    width = image.shape[1]
    colour = _rgb(rng.uniform(), rng.uniform(0, 0.35), rng.uniform(0.35, 0.95))
    _fill(image, _box(0, 0, width, horizon), colour)
    joint, step = colour * rng.uniform(0.75, 0.92), rng.uniform(9, 30)
    for y in np.arange(horizon % step, horizon, step):
        _fill(image, _box(0, y, width, y + 1), joint)
    for x in rng.uniform(0, width, rng.integers(0, 3)):
        gate = _box(x, horizon * 0.2, x + rng.uniform(25, 70), horizon)
        _fill(image, gate, colour * rng.uniform(0.5, 0.85))


def _draw_street(image, horizon, rng):
    width = image.shape[1]
    for x in rng.uniform(-0.1, 1, rng.integers(2, 7)) * width:
        colour = _rgb(rng.uniform(), rng.uniform(0, 0.3), rng.uniform(0.3, 0.95))
        right, top = x + rng.uniform(25, 90), horizon * rng.uniform(0.1, 0.8)
        _fill(image, _box(x, top, right, horizon), colour)
        pane = colour * rng.uniform(0.5, 0.8)
        for left in np.arange(x + 5, right - 8, 13):
            for y in np.arange(top + 6, horizon - 10, 16):
                _fill(image, _box(left, y, left + 6, y + 8), pane)
    for x in rng.uniform(0, width, rng.integers(0, 4)):
        leaves = _rgb(rng.uniform(0.12, 0.42), rng.uniform(0.2, 0.7), rng.uniform(0.25, 0.7))
        size = rng.uniform(10, 28)
        _fill(image, _box(x - 2, horizon - size, x + 2, horizon), (70, 54, 42))
        for dx, dy, shade in ((0, 0, 0.85), (-0.5, 0.35, 0.95), (0.5, 0.3, 1.0), (0.1, -0.5, 1.1)):
            _fill(image, _circle(x + dx * size, horizon - (1.4 - dy) * size, size * 0.75), leaves * shade)


def draw_photo(class_id, rng):
    """Draws a photo of one car.

    Args:
        class_id: Index into `CLASS_NAMES`.
        rng: `numpy.random.Generator`; everything but the model is drawn from it.

    Returns:
        uint8 RGB array of shape `(height, width, 3)`, and the box of the car as `(x1, y1, x2, y2)`, 0-based
        half-open ints.
    """
    width = int(rng.integers(210, 321))
    height = int(width * rng.uniform(0.62, 0.86))
    car = _CarSketch(CAR_MODELS[class_id], rng)
    roll = np.deg2rad(rng.uniform(-6, 6))
    turn = np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]]) * (rng.choice([-1, 1]), 1)
    outline = np.concatenate([points for points, _ in car.polygons]) @ turn.T
    low, high = outline.min(axis=0), outline.max(axis=0)
    scale = min(rng.uniform(0.48, 0.88) * width / (high[0] - low[0]), 0.8 * height / (high[1] - low[1]))
    size = (high - low) * scale
    corner = rng.uniform((0, 0.35), (1, 0.95)) * (np.array([width, height]) - size - 6) + 3
    # The horizon lies at the camera's height, above the wheels.
    horizon = int(np.clip(corner[1] + size[1] * rng.uniform(0.25, 0.75), 0.2 * height, 0.8 * height))
    image = _draw_background(width, height, horizon, rng)

    def place(points):
        return (points @ turn.T - low) * scale + corner

    shadow = np.full((height, width), 255, np.uint8)
    _fill(shadow, place(car.shadow), (rng.uniform(70, 150),))
    shadow = cv2.GaussianBlur(shadow, (0, 0), scale * 0.02 + 0.5)
    image = cv2.multiply(image, cv2.merge([shadow] * 3), scale=1 / 255)
    large = cv2.resize(image, None, fx=SUPERSAMPLING, fy=SUPERSAMPLING, interpolation=cv2.INTER_LINEAR)
    for points, colour in car.polygons:
        _fill(large, place(points), colour, SUPERSAMPLING)
    if rng.random() < 0.2:
        x, thickness = rng.uniform(0, width), rng.uniform(2, 5)
        _fill(large, _box(x, 0, x + thickness, height), np.full(3, rng.uniform(30, 200)), SUPERSAMPLING)
    image = cv2.resize(large, (width, height), interpolation=cv2.INTER_AREA)
    # As loose as boxes drawn by hand: with exact ones every wheel would lie on the same pixels of its crop.
    slack = rng.uniform(-0.02, 0.08, (2, 2)) * size
    x1, y1 = np.floor(np.maximum(corner - slack[0], 0))
    x2, y2 = np.ceil(np.minimum(corner + size + slack[1], (width, height)))
    return _expose(image, rng), (int(x1), int(y1), int(x2), int(y2))


def _expose(image, rng):
    """Applies light and camera: blur, uneven light, white balance, brightness, gamma, noise."""
    height, width = image.shape[:2]
    gain = rng.uniform(0.92, 1.08, 3) * rng.uniform(0.8, 1.15)
    curve = np.clip(np.linspace(0, 1, 256)[:, None] * gain, 0, 1) ** rng.uniform(0.7, 1.3)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.35, 0.8))
    image = cv2.LUT(image, (255 * curve).astype(np.uint8)[:, None])
    across, down = rng.uniform(-0.2, 0.2, 2)
    light = 1 + across * np.linspace(-1, 1, width) + down * np.linspace(-1, 1, height)[:, None]
    noise = rng.standard_normal((height, width), dtype=np.float32) * np.float32(rng.uniform(1, 4.5))
    image = image * light.astype(np.float32)[..., None] + noise[..., None]
    return np.clip(image, 0, 255).astype(np.uint8)
