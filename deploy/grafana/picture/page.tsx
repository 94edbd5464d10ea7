// A dashboard's panels by Grafana's own components. The page is given window.VIEW (see __main__.py).
import 'uplot/dist/uPlot.min.css';
import {
  createTheme,
  dateTime,
  FieldType,
  getDisplayProcessor,
  toDataFrame,
  type DataFrame,
  type GrafanaTheme2,
} from '@grafana/data';
import { initPluginTranslations } from '@grafana/i18n';
import { BigValue, BigValueColorMode, BigValueGraphMode, GlobalStyles, PanelChrome, ThemeContext, TimeSeries } from '@grafana/ui';
import { createRoot } from 'react-dom/client';

interface Series {
  legend: string;
  values: Array<[number, number]>; // seconds of Unix time
}
interface View {
  title: string;
  width: number;
  panels: Array<{ panel: any; series: Series[] }>;
  start_s: number;
  end_s: number;
}
declare global {
  interface Window {
    VIEW: View;
  }
}

const COLUMNS = 24;
const ROW = 34;
const GAP = 8;
const { VIEW } = window;

function frame({ legend, values }: Series, panel: any, index: number, theme: GrafanaTheme2): DataFrame {
  const { custom, ...defaults } = panel.fieldConfig.defaults;
  const config = {
    ...defaults,
    displayName: legend,
    color: { mode: 'palette-classic' },
    custom: { drawStyle: 'line', lineInterpolation: 'linear', spanNulls: true, ...custom },
  };
  const made = toDataFrame({
    fields: [
      { name: 'time', type: FieldType.time, values: values.map(([at]) => at * 1000) },
      { name: legend, type: FieldType.number, values: values.map(([, value]) => value), config },
    ],
  });
  for (const field of made.fields) {
    field.state = { seriesIndex: index, displayName: field.name };
    field.display = getDisplayProcessor({ field, theme });
  }
  return made;
}

function Lines({ panel, series, width, height, theme }: any) {
  const range = { from: dateTime(VIEW.start_s * 1000), to: dateTime(VIEW.end_s * 1000) };
  return (
    <TimeSeries
      frames={series.map((each: Series, index: number) => frame(each, panel, index, theme))}
      width={width}
      height={height}
      timeRange={{ ...range, raw: range }}
      timeZone="utc"
      legend={panel.options.legend}
    />
  );
}

function Number({ panel, series, width, height, theme }: any) {
  const field = frame(series[0], panel, 0, theme).fields[1];
  const value = { ...field.display!(field.values[field.values.length - 1]), title: '' };
  return (
    <BigValue
      value={value}
      width={width}
      height={height}
      theme={theme}
      colorMode={BigValueColorMode.Value}
      graphMode={BigValueGraphMode.None}
    />
  );
}

function Panels({ theme }: { theme: GrafanaTheme2 }) {
  return (
    <div style={{ padding: GAP, width: VIEW.width, background: theme.colors.background.canvas }}>
      <h3 style={{ margin: GAP }}>{VIEW.title}</h3>
      <div style={{ display: 'flex', flexWrap: 'wrap', gap: GAP }}>
        {VIEW.panels.map(({ panel, series }) => {
          const Drawn = panel.type === 'stat' ? Number : Lines;
          const width = ((VIEW.width - 2 * GAP) * panel.gridPos.w) / COLUMNS - GAP;
          return (
            <PanelChrome key={panel.id} title={panel.title} width={width} height={panel.gridPos.h * ROW}>
              {(width, height) => <Drawn panel={panel} series={series} width={width} height={height} theme={theme} />}
            </PanelChrome>
          );
        })}
      </div>
    </div>
  );
}

const theme = createTheme({ colors: { mode: 'dark' } });
initPluginTranslations('vlcache', []).then(() =>
  createRoot(document.getElementById('root')!).render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <Panels theme={theme} />
    </ThemeContext.Provider>
  )
);
