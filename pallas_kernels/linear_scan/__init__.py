"""h_t = a_t * h_{t-1} + x_t, element by element: the recurrence of HGRN (and of RG-LRU and SRU)."""
from pallas_kernels.linear_scan.api import linear_scan as linear_scan
from pallas_kernels.linear_scan.api import linear_scan_step as linear_scan_step
from pallas_kernels.linear_scan.stretch import linear_scan_stretch as linear_scan_stretch
