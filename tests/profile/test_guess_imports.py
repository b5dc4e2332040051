"""Imports out of byte code and out of source: the same as the parser finds, whatever the Python, and never a crash."""

from __future__ import annotations

import ast
import base64
import contextlib
import random
import struct
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erofsgen.errors import FormatError
from erofsgen.profile.guess import bytecode, source
from erofsgen.profile.guess.request import Code, Request

STDLIB = Path(sysconfig.get_path("stdlib"))
MODULES = sorted(path for path in STDLIB.glob("*.py") if path.stat().st_size < 200_000)[::4]

COMPILED = {
    "3.8": (
        "c-n1JO>fgc5S>}C9p^hu!<WPXaSMm2^uP%rq$(;^q^MGhpnI|0tW(mgop#+K8mTAxXDabaIPe4Z$|*;#oS3nxC<WUyo}Kl~oA=glo6Q>V^<yvj"
        "h5+B;&J~iqCd<E))1c9SD&Lq2<srwy$kbOpmU*dU;@cNR9H<}*i>RV1i9Gi0uJ*JvVOmvHgk_IbzNw{kRZknLiSQ1xClZp@yk@Tu_|}20(D!ZC"
        "MmT^>yoYVjp{`zmu6`D(qiec;1!^tn>c(8yF9q7VT2I!Fdt~>>?(61}R1avUWghO+{vPz(D`q$DqigOT><*)?H^Z&b&Ukx8A^>H5oy2;xFC1Pt"
        "T&_f!4X3d&hw)@SxvP`7(djX{1QcpeLL+J8DUUhRj8Y3i_8pEaql_nbrvcj*H)*ig)WX0ec`6cP`+KlpmQByI2~8&R#7r$8-!)jS_$kxD35`4L"
        "a1U+<xb#MYDPe|Dl*MThMXnY_=|Z0yjvG;QdLEl{M^$Fo#Kd`STU1$eyycqgs^oYxm;7sBh(+cvG4M8zPRT<UNb!;nleu^$muqzRp)VMf32oYS"
        "M(F;F>hP%hhmh@Yis+>AEQ_LLmB=J!a5&3I9DLS)<S<s=;b7vB9_@m&i<4P)WVxD7fKFBUv6+2L99UU&|73lJ3W~+4tM8;I3wt)Sc42LJ!@7XA"
        "ZEg}W@**=AO2ivv&&f8O&m!hZl7MIb)6Ru2OW9vB`TQxl9yUlqi8T>oK(W9cwy=vW844D+i@yL!V73Y"
    ),
    "3.9": (
        "c-n1JO>fgc5S>}C9p}4E!<U3Oa0`d1&4Cj_NL5v;NKvI$LfwnyWSx+9?X>F_kx0Ej|4jKMocIBI<<uirPR!U;l!EOU&(3=0&3o&(*{lIyKMs;_"
        "2=E>5T_M>UvivJK4H^xo@{Orb9&#*<Onv2JnU_i?zI|E5feNy)h$^a*$YbB`YfnoPrd3r%SaoUTn_5~|^|Yay2=5?!CLw7pKOyj~16`r7+p3Ll"
        "1ew@`UC^PfUV*ND7HUn`bo~m{deYI26Jfs;SQ~01SwHTQJs^9in=`2%(N4=eKBWBv=(TT{+o*@Gd3dzH6K%iU*&gnVc5g@mpscTxSPy!_;nLyi"
        "MwHob8XGf?CnuBpDv4W_o{~#Ip#~*1k}{t1m@&;LwIF2Q;m|V5XoB||ux)db21`vX3|x|@A~CYR2Mgxe^dg(kWHL|8)bin7gXM~!GVPzzxYIT6"
        "!OZ|y-mpI<%rJ_wI8CC+)uJd}=nKPfBZ|&0VpHy@$~>ExIL~d1DvOSHT$5du9B<~5e+&$<$owS+-sQ1Y@(>16yyU}VE?&vy8Xdmx2}Wf?1G~Wp"
        "oqtgs&N_bx*)FGuP8!d%C|XsCOk(=uc}C*ki{2B5vGT_Ki9>p{3(l9P^K53hnofXDRr#@*e@GlyS#<wseTE8(#hI(`rKbyfzGLme+VGZj0c+db"
        "BxK}8W|m6Cn`B#L1Lw1dxsoK{`Tw+Y;j2>i*GxWtPOgg$l2BqzgcwjPkTV@@$xyJk9sC7k?zMI"
    ),
    "3.10": (
        "c-n1JO>fgc5S>}Coy~WehA+Vx5e^abj1Z`*N>wRBY7y#QEH~?vv}>nbw?HEGME^|x2`7HQUODy1l?%++R4N7AGv1x?%-i?I^LD!deErx-zahYP"
        "xOFMAS7gOkas~`q(A66=p#$W#urdpEh*ex_nTGCRxsG&{%W_rIwNxI4?uiMEv?{CXI>NF+yU;eWrfy~}-9~s1c~?T(S-eKz+eD^DUw3sEVGnZr"
        "1e;)#sb7Gpe-XN88m4&xdL`|f){$`UN~~4AnywrU$nKEcHSGhb?@^{>@9$E62Zr4%<~AOpZ}0BC-H6xUY^-l@jW@4I0-$JU(!{I{g~x@*<&~(S"
        "YMNNPpG=M>w^b6?Dm@~Xf<^;c7$ju^9WY}$qcnn$Lyy~zQN|Oz)qriCo3vPJYGL7=JQazt`*W~pmQT;}37t$9shv6=-X%D$_$jl|F&%f>;~w0s"
        "h09=jG$l+G$9a;aaqJs$oXyRd<#j8LPtFosWpr(pPi#^Yu0y3|#~ZHAu1=1VMO6M63R_sl{*nW4GU-)JgoO;xd7R89sMuVh#}7lnxJ+rytujXc"
        "UtEs|{cB1+bOR0%p)8r@alEV(oz#x@XF17(PlpdYCOX(3O+3<Ld~~`vp5+IQt7!%_R~;sH_A&L~WZC_*3mGaZHz&Til^xIB>4tN2=hQXt64rIO"
        "iDKk=ZWmf4&&ZyWt@)5;EVLvEPyeT$S1&5zUo!dPF}VRvNTI|ADiM*G0te)KD1LQ>l1eD-)BZPjx3&%"
    ),
    "3.11": (
        "c-nPSK~Eb;6n<}K)?V8fut@+1ACOw9auku4OAl0)B7{gp<+g$gb6G8(HF2`Lz!(}pLh^wFha7UK)c%52QKejS&L60(s)yB_kb2_gh#nB9&f8@R"
        "1lafX&6_v#-uw2O+270MBGB`3+5Zy({(&nGzZg%?jrj#6NDM%vBZih>NWK;D&=xkPaW1%TD?9OXA{X(*%Zt3vU)Wh;m6J^JzzGYYfKUK4vx8z-"
        "5~XlRlo6uJXW$Qi4$7>`oXne@BVq($6(ar$cG)VtLJJl_I)@+&zgYl(SXpf`DvO68Dt=X#UM5kMVi*%+e&xlzY@hM(U-8E?Uk<HvF<~;w!Q_g`"
        "TZYE)2`w}msLLy>KP<TOPZ#Ewo;4Rw3}IlRw)8zY+psk5Y1}`t(x}t+f?&;Sy=-0OG{bpXPdN2Kpafw_G(0lFBs18#v`km7aY@nkW(z+lz^K4*"
        "dMGA6fCFPqiq%vX&2ycoy%V(zCf@afwkn%&m)54I&v`hrX@Iu(+0smVlom#e=|Sw=KPqQ(O1&Dkc3d~|Lf>_D(RITOxf75-<holsUU0FJ??kP@"
        ">vk0tdkd;Uq*F~*$_#<+K1$kT67y=WNiwj|9v{F>lNO@%8x$rCR5J#w075(fx`KuUma^~`H9j{4<WnkURgJ1m5)k5ZIzgy$T}_#hN_8KkH1Jyg"
        "HcikFAEDQYTz9`<*zkjywN7OC#)plXMo+V~nU+SQQs=h!HapR}BB+|v716dAbbj(RC_8Drt8xS>pG>xN=~=kBp|%&4+EA+SKYavGRg>P-c_Rw;"
        "wB>zi-mlC%t8F@kuIA<hwiR9DOa9NDZ_*?CRy{UT`t0tUu>*#PF;x3^YYfx<>l#D3mq^S;2f(lr^O4?CD#v`Z_Z>;h3V*W+b9y)#^NId-9as$O"
        "F|YUU(6cySrPTVRiTPCjHl;79pPiizIKy#5^Qrkr=HJVhgZO|drskNHj`sgzwLYuGe6069Nn9wtzIU|sdi%|fKd<~c*LS|?**7^#{*`ym*YLjd"
        "#AY8j8v7q$WH#>"
    ),
    "3.12": (
        "c-n1JO-~d-5UrZ-*`3*CVOfyn>p-H3EHS8DF(yig8Y0oig}zLN?O9xy8K8F&mV|@@2S`lN6aEEaJoyXsYGRa&*npaN;>O28!^!R$Kq7XgtGlbZ"
        ">eYKaA2OK~=yCAG`-lKP;oP7n>rtzUtOEy*KCpPjz+eRR-tcK)G81DzWz;i;8SN7+5z=UvWJ!-sq~O932~Ifmt-xkBf(`0q`l%qz(m@@|AQ*5D"
        "xU~%2er?1VEXz~Nz#6?APfvEM3Nb<xYw{W=x-TLqZ_j_d*DiW_-8f}=RWIYWzA+GLcp1F<D<D*FJi(Ky&j!|jFbdBf&cQqxg*hzL@9EUx0?N$D"
        "=%Ybr;Qrvi(1YQ7drCA=UXyz+?<*J*YZ4dsjM!_HT;Csai<8Ck4H&12w}V#P1BM)!!BMG97~w=Qr!}KMB@PLFdANxGq!XQ97p1E-@L>^aP%wtY"
        "32>qumS)4E>W5Z5za%osUD2_wu45YXPOBzM3uLIbl+^)KnI+h<E*<Im1yfp%6S{%tI5Oop!4#kM^}fz=W@cUgB$6zLMc=Jdgf6iGqESC|gEr|?"
        "Q?HBb|6v)nY3|5Cvn9T!gBK);IAu>c89oHK2<myDKw@4SDDkPHl#I#si8fuURfA}Kx*~Lm<Dx^Yxxd7|(Y6Ry(+b>j=r{|uBIWtLW93kZg*}Bf"
        "iLNALy+w)Y<1$gLO_#%Qp?i{4zpXS~zx>RTAj}A5UL-VnGCIu2^n+k}N>m4hm=eN1Q$cqkauK#ho(lb%G~63%-c++snp(_?q)N!DXwjF?WIVQR"
        "#me6n*VR!otkjg*Cy4kRa-Si$3tiig`AV`owBaYsZV~$n$#0VUF3s;71UtXe&R+?FEeD{?p@rD~gQQm$Hc8tyZQ8O^Yt5_8D>G}=)#{7K>mx5m"
        "UiE*nt}dCoko&!#2dn82P#5XYke$aB-P&90PCvZsPv5o4dkdBQ1MDvA`T"
    ),
    "3.13": (
        "c-n1JOK;Rj5UzH&J)T!GnaP7>vm28O3_<~d5YqBEfTCT-((vdUKpLs#OlAfPk0&WRh~$*h3QoWQ!C&A<aN!3a5Qjw_0xNOKEo_89oanYE5D{AK"
        ">h5aS_f>t>JH=uS^!UhIF9^T~*fUsv-8rsq9svhVT)=cCH3O-m_lC=ACYny_XUH1n;eMcJLh7~9y3CSY1~UzIEeHF?_ZUmXP|jStmc^_Cf9R9x"
        "=4yG&*9us4-~dbmw<mySPZ?<pmUwOgaHvt{`9H5K4A$qZV5Kp1?eKm!<vsFC@6r8UUO2{ZOyL#X1E&oKI^-ZU1~TAf0aVo%&!}7nanOM&s9$cw"
        "IXVSxQXSaR!SyPU#rYdo=ETLn=PtUJ>VIu1F+q9F#g?}?TQwwEm1J$pNWFI33xWl&d8@fM1!K1p)1W)i03;mH-~=f*IMu3irW7!_iB^YJElJ$1"
        "0j-RVtT)L|SX5&b5-hHeTnI@Aszx3ASy+D9UJ08jITp2oHfpFy-#LzC-I*noaa&S%rd`q(s>`qrZ|#vCjsFy?8EFd<dfk=~GABg0x407MeL;xj"
        "6)))D3<}ZqF^U5}Y=u4L$oOG1@S+HZ6pS1ZB8t7(ZwfDt(O+1JTagertgEUdP1h#BYmyZ8yZQ$<SoxDd%+d5WeYsD}M1az+0EP=S5~^k@5ojvH"
        "QzFStRevT`VitebSd*GWi|Hinl5}uNt>qsoykp}DtyZAx`JoVNSyg{4m|5^cr7Ss89hbzDbYZ3`iJFVjidUEXu!A}$$@Hs`rWg3PTT(SNVY!2r"
        "X3r#tWtqR!UFu;xhuA~Repf+ff+GpHX6}W-sx-Xg>N}ynS!rtBBgvG+@lP^J`)t~z^LSDnb%oKYGTW38@*c{spu7pr1{B}X(pxt8ftB9S?7wtO"
        "%}qA8ZBR1#o=twXC>i|-%KUE=GVveH-(7o6$2VBzO*VIb_}=i{<@@oy_`%i3^AG2roOx*<S~oYL{AGI#?8*)h4f30&octQ;C-BU^V8L^%aAAZ#"
        "A12Cv1IzdM2L"
    ),
}
"""One module, whose source is SOURCE, as each CPython compiles it: base 85 of zlib. It was changed at 1,700,000,000."""

SOURCE = """\
import a, b.c as d
from typing import TYPE_CHECKING
import typing
if TYPE_CHECKING:
    import dead
else:
    import alive
if typing.TYPE_CHECKING:
    from . import dead2
try:
    from .x import y, z as q
except ImportError:
    from .. import fallback
class K:
    import inclass
    def f(self):
        import infunc
def g():
    from infunc2 import h
if __name__ == "__main__":
    import mainonly
names = [g.a0, g.a1, g.a2, "model.bin"]
from last import *
"""

SIZE = len(SOURCE)


def compiled(version: str) -> bytes:
    return zlib.decompress(base64.b85decode(COMPILED[version]))


def shown(code: Code | None) -> list[str]:
    assert code is not None
    return ["." * each.level + each.name + "".join(f" {name}" for name in each.names) for each in code.requests]


RUNS = ["a", "b.c", "typing TYPE_CHECKING", "typing", "alive", ".x y z", ".. fallback", "inclass", "last *"]


def by_parser(tree: ast.AST) -> Iterator[Request]:
    """What is at module level and in class bodies, but not below conditions that no import meets."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                continue
            case ast.Import(names):
                yield from (Request(0, name.name, ()) for name in names)
            case ast.ImportFrom(module, names, level):
                yield Request(level, module or "", tuple(name.name for name in names))
            case ast.If(test, _, orelse) if any(word in ast.unparse(test) for word in ("__main__", "TYPE_CHECKING")):
                for other in orelse:
                    yield from by_parser(ast.Module([other], []))
            case _:
                yield from by_parser(node)


@pytest.mark.parametrize("version", COMPILED)
def test_every_python(version: str) -> None:
    data = compiled(version)
    assert sorted(shown(bytecode.imports(data))) == sorted(RUNS)
    assert bytecode.is_valid(data, 1_700_000_000, SIZE)
    assert not bytecode.is_valid(data, 1_700_000_001, SIZE)
    assert not bytecode.is_valid(data, 1_700_000_000, SIZE + 1)
    everything = bytecode.imports(data, everything=True)
    assert {"mainonly", "infunc", "infunc2 h"} <= set(shown(everything))
    assert "dead" not in shown(everything)
    assert "model.bin" in everything.texts


def test_source_says_the_same() -> None:
    assert shown(source.imports(SOURCE.encode())) == RUNS
    everything = source.imports(SOURCE.encode(), everything=True)
    assert {"mainonly", "infunc", "infunc2 h"} <= set(shown(everything))
    assert "model.bin" in everything.texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import os, sys as system; import json", ["os", "sys", "json"]),
        ("from . import(a,\n  b as c,  # d\n)", [". a b"]),
        ("from .import x", [". x"]),
        ("from a.b \\\n  import c", ["a.b c"]),
        ("try: import x\nexcept ImportError: y = None", ["x"]),
        ("'''\nimport no\n'''\nimport yes", ["yes"]),
        ("def f(\n  a,\n):\n  import no\nimport yes", ["yes"]),
        ("async def f():\n  import no\nif x:\n  import yes", ["yes"]),
        ("with x:\n\timport yes", ["yes"]),
        ('q = \'"""\'\nimport yes\nr = \'"""\'', ["yes"]),
        ("from\nimport\nimport (\nfrom . import", []),
        ("from . import", []),
    ],
)
def test_lines(text: str, expected: list[str]) -> None:
    assert shown(source.imports(text.encode())) == expected


def test_what_only_entrypoints_are_asked_for() -> None:
    text = b"import numpy as np, scipy\nnp.random.rand(scipy.stats.norm)\n__import__('hook'); import_module(\"b.c\")\n"
    found = shown(source.imports(text, everything=True))
    assert {"numpy", "scipy", "numpy.random.rand", "scipy.stats.norm", "hook", "b.c"} <= set(found)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_standard_library(path: Path) -> None:
    text = path.read_bytes()
    expected = set(by_parser(ast.parse(text)))
    assert set(source.imports(text).requests) == expected
    if sys.implementation.name == "cpython" and sys.version_info < (3, 15):
        header = struct.pack("<4sIII", __import__("importlib.util").util.MAGIC_NUMBER, 0, 0, len(text))
        data = header + __import__("marshal").dumps(compile(text, path.name, "exec", dont_inherit=True))
        found = bytecode.imports(data)
        assert found is not None
        # the compiler leaves out what constants decide
        assert set(found.requests) <= expected
        assert len(expected - set(found.requests)) <= 1


def test_other_pythons_are_not_known() -> None:
    assert bytecode.imports(b"\x00\x10\r\n" + bytes(12) + b"\xe3") is None
    assert bytecode.imports(b"") is None


@pytest.mark.parametrize("version", COMPILED)
def test_damaged_byte_code(version: str) -> None:
    generator = random.Random(version)
    data = compiled(version)
    for _ in range(1_500):
        damaged = bytearray(data[: generator.randrange(16, len(data) + 1)] if generator.random() < 0.2 else data)
        for _ in range(generator.randrange(1, 8)):
            damaged[generator.randrange(16, max(len(damaged), 17)) % len(damaged)] = generator.randrange(256)
        with contextlib.suppress(FormatError):
            bytecode.imports(bytes(damaged), everything=generator.random() < 0.5)


@given(st.sampled_from(sorted(COMPILED)), st.binary(max_size=400), st.booleans())
def test_no_byte_code_at_all(version: str, tail: bytes, everything: bool) -> None:
    for head in (compiled(version)[:16], compiled(version)[:60]):
        with contextlib.suppress(FormatError):
            bytecode.imports(head + tail, everything=everything)


@given(st.one_of(st.binary(max_size=400), st.text("import from.()\\\n\t ;#'\"ab:if def", max_size=400).map(str.encode)))
def test_any_source(text: bytes) -> None:
    for everything in (False, True):
        for request in source.imports(text, everything=everything).requests:
            assert request.name or request.level


@pytest.mark.parametrize(
    "text",
    [
        b"from x import (" * 100_000,
        b"'''" * 400_000,
        b"from x import (\n" * 100_000,
        b" " * 2_000_000,
        b"import a\\\n" * 100_000,
        b"import a as b\nb.c\n" * 50_000,
        b"(" * 1_000_000,
    ],
    ids=range(7),
)
def test_hostile_source_takes_no_time(text: bytes) -> None:
    started = time.process_time()
    source.imports(text, everything=True)
    assert time.process_time() - started < 2


def test_hostile_byte_code_takes_no_time() -> None:
    """Many imports of one huge tuple of names."""
    header = struct.pack("<HHIII", 3495, 0x0A0D, 0, 0, 0)
    code = b"\x64\x00\x64\x01\x6c\x00" * 20_000
    names = b"(" + struct.pack("<I", 100_000) + b"z\x01a" * 100_000
    body = b"s" + struct.pack("<I", len(code)) + code + b")\x02i\0\0\0\0" + names + b")\x01z\x01m"
    data = header + b"c" + bytes(20) + body + b")\x00" + b"s\0\0\0\0" + b"z\x01f" * 3 + bytes(4) + b"s\0\0\0\0" * 2
    started = time.process_time()
    found = bytecode.imports(data)
    assert found is not None
    assert found.requests[0].names[:2] == ("a", "a")
    assert time.process_time() - started < 2
