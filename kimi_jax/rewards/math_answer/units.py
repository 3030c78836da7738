"""Units of measurement: what converts into what.

A unit is a factor and the powers of its base dimensions. Words that stand in no table ("apples", "个") are dimensions
of their own, so that five apples are not five pears. Temperatures in °C, °F and K are told apart and not converted.
"""

from dataclasses import dataclass
from fractions import Fraction

_MAX_POWER = 12


@dataclass(frozen=True)
class Unit:
    factor: Fraction  # of the base units
    dimensions: tuple[tuple[str, int], ...]  # (base, power), sorted, no power 0

    def times(self, other: "Unit", power: int) -> "Unit":
        """self · other^power."""
        power = max(-_MAX_POWER, min(_MAX_POWER, power))
        powers = dict(self.dimensions)
        for base, exponent in other.dimensions:
            powers[base] = powers.get(base, 0) + exponent * power
        dimensions = tuple(sorted((base, exponent) for base, exponent in powers.items() if exponent))
        return Unit(self.factor * other.factor**power, dimensions)


_BASES = {  # base unit -> {factor: spellings}
    "m": {
        "1": "m meter meters metre metres 米",
        "1e3": "km kilometer kilometers kilometre kilometres 千米 公里",
        "1e-1": "dm decimeter decimeters decimetre 分米",
        "1e-2": "cm centimeter centimeters centimetre centimetres 厘米",
        "1e-3": "mm millimeter millimeters millimetre millimetres 毫米",
        "1e-6": "μm um micrometer micrometers micron microns 微米",
        "1e-9": "nm nanometer nanometers 纳米",
        "0.0254": "inch inches",
        "0.3048": "ft foot feet",
        "0.9144": "yd yard yards",
        "1609.344": "mi mile miles",
    },
    "g": {
        "1": "g gram grams 克",
        "1e3": "kg kilogram kilograms 千克 公斤",
        "1e-3": "mg milligram milligrams 毫克",
        "1e6": "tonne tonnes 吨",
        "453.59237": "lb lbs pound pounds",
        "28.349523125": "oz ounce ounces",
        "500": "斤",
    },
    "s": {
        "1": "s sec secs second seconds 秒",
        "1e-3": "ms millisecond milliseconds 毫秒",
        "60": "min mins minute minutes 分钟 分",
        "3600": "h hr hrs hour hours 小时 时",
        "86400": "day days 天 日",
        "604800": "week weeks 周 星期",
    },
    "month": {"1": "month months 月 个月", "12": "year years yr yrs 年"},
    "A": {"1": "A ampere amperes amp amps 安培 安", "1e-3": "mA"},
    "K": {"1": "K kelvin kelvins 开尔文"},
    "°C": {"1": "°C 摄氏度"},
    "°F": {"1": "°F 华氏度"},
    "mol": {"1": "mol mole moles 摩尔", "1e-3": "mmol"},
    "$": {"1": "\\$ dollar dollars usd USD 美元", "1e-2": "cent cents ¢"},
    "€": {"1": "€ euro euros EUR 欧元"},
    "£": {"1": "£ GBP 英镑"},
    "¥": {"1": "¥ yuan rmb RMB CNY 元 块", "1e-1": "角", "1e4": "万元"},
    "₩": {"1": "₩ won"},
    "₹": {"1": "₹ rupee rupees"},
    "deg": {"1": "deg degree degrees 度"},
    "bit": {"1": "bit bits", "8": "byte bytes", "8e3": "kB KB", "8e6": "MB", "8e9": "GB"},
}
_DERIVED = {  # factor: spellings, powers of the base units
    "L": ({"1e-3": "L l liter liters litre litres 升", "1e-6": "mL ml milliliter milliliters 毫升 cc"}, {"m": 3}),
    "area": ({"1e4": "hectare hectares ha 公顷", "4046.8564224": "acre acres 英亩"}, {"m": 2}),
    "areas": ({"1": "平方米", "1e6": "平方千米 平方公里", "1e-4": "平方厘米", "1e-2": "平方分米"}, {"m": 2}),
    "volumes": ({"1": "立方米", "1e-6": "立方厘米", "1e-3": "立方分米"}, {"m": 3}),
    "speed": ({"0.44704": "mph"}, {"m": 1, "s": -1}),
    "km/h": ({"5/18": "kmph kmh kph"}, {"m": 1, "s": -1}),
    "N": ({"1e3": "N newton newtons 牛顿 牛", "1e6": "kN"}, {"g": 1, "m": 1, "s": -2}),
    "J": ({"1e3": "J joule joules 焦耳 焦", "1e6": "kJ", "1e9": "MJ"}, {"g": 1, "m": 2, "s": -2}),
    "W": ({"1e3": "W watt watts 瓦特 瓦", "1e6": "kW 千瓦", "1e9": "MW"}, {"g": 1, "m": 2, "s": -3}),
    "Pa": (
        {"1e3": "Pa pascal pascals 帕斯卡 帕", "1e6": "kPa", "1e9": "MPa", "101325000": "atm"},
        {"g": 1, "m": -1, "s": -2},
    ),
    "V": ({"1e3": "V volt volts 伏特 伏", "1": "mV", "1e6": "kV"}, {"g": 1, "m": 2, "s": -3, "A": -1}),
    "Ω": ({"1e3": "Ω \\Omega ohm ohms 欧姆 欧", "1e6": "kΩ"}, {"g": 1, "m": 2, "s": -3, "A": -2}),
    "C": ({"1": "C coulomb coulombs 库仑", "1e-6": "μC"}, {"A": 1, "s": 1}),
    "Hz": ({"1": "Hz hertz 赫兹", "1e3": "kHz", "1e6": "MHz", "1e9": "GHz"}, {"s": -1}),
    "pct": ({"1/100": "pct percent percentage"}, {}),
    "rad": ({"1": "rad radian radians 弧度"}, {}),
    "count": ({"1": "unit units 个单位 单位"}, {}),
}


def _table() -> dict[str, Unit]:
    table = {}
    for base, units in _BASES.items():
        for factor, spellings in units.items():
            table.update(dict.fromkeys(spellings.split(), Unit(Fraction(factor), ((base, 1),))))
    for units, powers in _DERIVED.values():
        for factor, spellings in units.items():
            table.update(dict.fromkeys(spellings.split(), Unit(Fraction(factor), tuple(sorted(powers.items())))))
    return table


UNITS = _table()
DEGREE = UNITS["deg"].dimensions
SCALES = {  # words that multiply
    **{"dozen": 12, "dozens": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9},
    **{"trillion": 10**12, "百": 10**2, "千": 10**3, "万": 10**4, "百万": 10**6, "亿": 10**8},
}
